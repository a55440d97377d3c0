/* The doodle model in plain JavaScript: it draws, and it forgets. No library, no network (tests/test_live.py).

   Everything is a matrix [channels, places] of 32-bit numbers in one memory, named by the index where it begins, and nearly
   all work is one product of two of them (`mul`). A small WebAssembly function does it, put together below byte by byte;
   where there is none, JavaScript does the same, more slowly. Names of weights are those of diffusers. */
function dugeEngine(plain) {
  "use strict";

  // ---- one memory, and the product
  const PAGES = 1024; // of 64 KB
  const memory = plain ? { buffer: new ArrayBuffer(PAGES * 65536) } : new WebAssembly.Memory({ initial: PAGES, maximum: PAGES });
  const F = new Float32Array(memory.buffer);
  let top = 4096; // the first numbers stay zero: they are the bias of what has none
  const take = (n) => { const at = top; top += (n + 3) & ~3; if (top > F.length) throw Error("out of memory"); return at; };
  const within = (work) => { const mark = top; const result = work(); top = mark; return result; };

  /* C[M, N] = A[M, K] B[K, N] + bias[M]: four rows and eight columns at a time. M goes by 4, N by 8. */
  function kernel() {
    const num = (n) => { const out = []; do { const more = n >> 7; out.push((n & 127) | (more ? 128 : 0)); n = more; } while (n); return out; };
    const name = (s) => [s.length, ...[...s].map((c) => c.charCodeAt(0))];
    const section = (id, ...body) => { const flat = body.flat(9); return [id, ...num(flat.length), ...flat]; };
    const get = (i) => [0x20, i], set = (i, ...x) => [...x.flat(9), 0x21, i];
    const plus = (i, x) => set(i, get(i), x, 0x6a), sum = (i, k) => [get(i), get(k), 0x6a], by = (n) => [0x41, n];
    const loop = (...body) => [0x03, 0x40, ...body.flat(9), 0x0b], again = (...test) => [...test.flat(9), 0x0d, 0];
    const load = (i, at) => [get(i), 0xfd, 0x00, 2, at], spread = (i, at) => [get(i), 0xfd, 0x09, 2, at];
    const store = (i, at, x) => [get(i), x, 0xfd, 0x0b, 2, at];
    const muladd = (acc, x, y) => set(acc, get(acc), get(x), get(y), 0xfd, 0xe6, 1, 0xfd, 0xe4, 1);
    const [A, B, C, P, M, K, N, bias, j, p, end, b, i, a, , , , c, K4, N4, q] = [...Array(21).keys()];
    const acc = 21, left = 29, right = 30, one = 31, rows = [0, 1, 2, 3];
    const body = [
      set(K4, get(K), by(2), 0x74), set(N4, get(N), by(2), 0x74), set(end, get(P), get(K), by(5), 0x74, 0x6a),
      loop( // over columns
        set(p, get(P)), set(b, sum(B, j)),
        loop(store(p, 0, load(b, 0)), store(p, 16, load(b, 16)), plus(b, get(N4)), plus(p, by(32)), again(get(p), get(end), 0x47)),
        set(a, get(A)), set(c, sum(C, j)), set(q, get(bias)), set(i, get(M)),
        loop( // over rows
          rows.map((r) => [r ? set(a + r, sum(a + r - 1, K4)) : [], set(acc + 2 * r, spread(q, 4 * r)), set(acc + 2 * r + 1, spread(q, 4 * r))]),
          set(p, get(P)),
          loop( // over what is summed
            set(left, load(p, 0)), set(right, load(p, 16)),
            rows.map((r) => [set(one, spread(a + r, 0)), muladd(acc + 2 * r, one, left), muladd(acc + 2 * r + 1, one, right), plus(a + r, by(4))]),
            plus(p, by(32)), again(get(p), get(end), 0x47),
          ),
          rows.map((r) => [store(c, 0, get(acc + 2 * r)), store(c, 16, get(acc + 2 * r + 1)), plus(c, get(N4))]),
          set(a, get(a + 3)), plus(q, by(16)), set(i, get(i), by(4), 0x6b), again(get(i)),
        ),
        plus(j, by(32)), again(get(j), get(N4), 0x47),
      ),
      0x0b,
    ].flat(9);
    const code = [2, 13, 0x7f, 11, 0x7b, ...body]; // locals: numbers, then vectors of four
    const bytes = [
      0, 0x61, 0x73, 0x6d, 1, 0, 0, 0, section(1, 1, 0x60, 8, Array(8).fill(0x7f), 0),
      section(2, 1, name("m"), name("m"), 2, 1, num(PAGES), num(PAGES)), section(3, 1, 0),
      section(7, 1, name("mul"), 0, 0), section(10, 1, num(code.length), code),
    ].flat(9);
    return new WebAssembly.Instance(new WebAssembly.Module(new Uint8Array(bytes)), { m: { m: memory } }).exports.mul;
  }

  function slowly(A, B, C, P, M, K, N, bias) { // the same in JavaScript
    for (let j = 0; j < N; j += 4) {
      for (let k = 0, p = P, b = B + j; k < K; k++, p += 4, b += N) { F[p] = F[b]; F[p + 1] = F[b + 1]; F[p + 2] = F[b + 2]; F[p + 3] = F[b + 3]; }
      for (let i = 0; i < M; i += 2) {
        let r = F[bias + i], r1 = r, r2 = r, r3 = r, s = F[bias + i + 1], s1 = s, s2 = s, s3 = s;
        for (let k = 0, a = A + i * K, p = P; k < K; k++, a++, p += 4) {
          const x = F[a], y = F[a + K], b0 = F[p], b1 = F[p + 1], b2 = F[p + 2], b3 = F[p + 3];
          r += x * b0; r1 += x * b1; r2 += x * b2; r3 += x * b3; s += y * b0; s1 += y * b1; s2 += y * b2; s3 += y * b3;
        }
        const c = C + i * N + j, d = c + N;
        F[c] = r; F[c + 1] = r1; F[c + 2] = r2; F[c + 3] = r3; F[d] = s; F[d + 1] = s1; F[d + 2] = s2; F[d + 3] = s3;
      }
    }
  }

  let product = null, means = "JavaScript";
  try { if (!plain) { product = kernel(); means = "WebAssembly"; } } catch (error) { product = null; }
  const panel = take(8 * 2560);
  function mul(A, B, M, K, N, bias = 0, out = take(((M + 3) & ~3) * N)) {
    const rows = (M + 3) & ~3;
    if (product) product(4 * A, 4 * B, 4 * out, 4 * panel, rows, K, N, 4 * bias);
    else slowly(A, B, out, panel, rows, K, N, bias);
    return out;
  }

  // ---- weights: a safetensors file of 16-bit numbers
  const W = {}, shapes = {};
  function half(h) { // a 16-bit number
    const e = (h >> 10) & 31, m = h & 1023, s = h & 32768 ? -1 : 1;
    return e === 31 ? s * Infinity : s * (e ? 2 ** (e - 15) * (1 + m / 1024) : 2 ** -14 * (m / 1024));
  }
  function bytesOf(base64) {
    const text = atob(base64), out = new Uint8Array(text.length);
    for (let i = 0; i < out.length; i++) out[i] = text.charCodeAt(i);
    return out.buffer;
  }
  function safetensors(buffer) { // name -> { shape, data }: typed arrays of the file's own numbers
    const size = Number(new DataView(buffer).getBigUint64(0, true));
    const about = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, size))), out = {};
    const kinds = { F16: Uint16Array, I8: Int8Array, F32: Float32Array };
    for (const [name, { dtype, shape, data_offsets: [from, to] }] of Object.entries(about)) {
      if (name !== "__metadata__") out[name] = { shape, data: new kinds[dtype](buffer.slice(8 + size + from, 8 + size + to)) };
    }
    return out;
  }
  function load(base64) {
    const table = Float32Array.from({ length: 65536 }, (_, h) => half(h));
    for (const [name, { shape, data }] of Object.entries(safetensors(bytesOf(base64)))) {
      const rows = shape[0], each = data.length / rows;
      const at = take(((rows + 3) & ~3) * each); // rows of zeros, so that they go by four
      for (let i = 0; i < data.length; i++) F[at + i] = table[data[i]];
      W[name] = at; shapes[name] = shape;
    }
  }
  const wide = (name) => shapes[name + ".weight"][0];
  const bias = (name) => W[name + ".bias"] || 0;

  // ---- layers
  const linear = (x, name, N) => mul(W[name + ".weight"], x, wide(name), shapes[name + ".weight"][1], N, bias(name));
  const add = (x, y, n) => { for (let i = 0; i < n; i++) F[x + i] += F[y + i]; return x; };
  const silu = (v) => v / (1 + Math.exp(-v));

  /* 3x3: every place with its eight neighbours becomes a column. `more` is a bias of its own. */
  function conv(x, name, size, stride = 1, more = bias(name)) {
    const [M, channels, k] = shapes[name + ".weight"], N = (size / stride) ** 2, out = take(((M + 3) & ~3) * N);
    if (k === 1) return mul(W[name + ".weight"], x, M, channels, N, more, out);
    return within(() => {
      const col = take(channels * 9 * N), to = size / stride;
      let at = col;
      for (let c = 0; c < channels; c++) for (let dy = -1; dy < 2; dy++) for (let dx = -1; dx < 2; dx++) {
        for (let i = 0; i < to; i++, at += to) {
          const y = i * stride + dy, row = x + (c * size + y) * size + dx, from = dx < 0 ? 1 : 0;
          const until = dx > 0 && stride === 1 ? to - 1 : to;
          if (y < 0 || y >= size) { F.fill(0, at, at + to); continue; }
          F[at] = F[at + to - 1] = 0; // beyond the border
          for (let j = from; j < until; j++) F[at + j] = F[row + j * stride];
        }
      }
      return mul(W[name + ".weight"], col, M, channels * 9, N, more, out);
    });
  }

  function groupNorm(x, name, N, groups, eps, act) {
    const C = wide(name), w = W[name + ".weight"], b = bias(name), each = (C / groups) * N, out = take(C * N);
    for (let g = 0; g < groups; g++) {
      const from = g * each;
      let s = 0, ss = 0;
      for (let i = from; i < from + each; i++) s += F[x + i];
      const mean = s / each;
      for (let i = from; i < from + each; i++) { const d = F[x + i] - mean; ss += d * d; }
      const scale = 1 / Math.sqrt(ss / each + eps);
      for (let i = from; i < from + each; i++) {
        const c = (i / N) | 0, v = (F[x + i] - mean) * scale * F[w + c] + F[b + c];
        F[out + i] = act ? silu(v) : v;
      }
    }
    return out;
  }

  function layerNorm(x, name, N) { // over the channels of each place
    const C = wide(name), w = W[name + ".weight"], b = bias(name), out = take(C * N);
    for (let j = 0; j < N; j++) {
      let s = 0, ss = 0;
      for (let c = 0; c < C; c++) s += F[x + c * N + j];
      const mean = s / C;
      for (let c = 0; c < C; c++) ss += (F[x + c * N + j] - mean) ** 2;
      const scale = 1 / Math.sqrt(ss / C + 1e-5);
      for (let c = 0; c < C; c++) F[out + c * N + j] = (F[x + c * N + j] - mean) * scale * F[w + c] + F[b + c];
    }
    return out;
  }

  /* What the heads say: q [C, N] asks k, v [C, T]. `causal`: a word hears only itself and those before it. */
  let heard = null; // while a picture is drawn: by number of places, what each token is listened to, [24, N]
  function attend(q, k, v, C, N, T, heads, causal, into = null) {
    const d = C / heads, out = take(C * N), scale = 1 / Math.sqrt(d);
    within(() => {
      const kT = take(T * d), maps = take(T * N), most = new Float32Array(N), sums = new Float32Array(N);
      for (let h = 0; h < heads; h++) {
        const from = h * d;
        for (let t = 0; t < T; t++) for (let c = 0; c < d; c++) F[kT + t * d + c] = scale * F[k + (from + c) * T + t];
        mul(kT, q + from * N, T, d, N, 0, maps);
        most.fill(-Infinity); sums.fill(0);
        for (let t = 0; t < T; t++) { // softmax over T, for all places at once
          const row = maps + t * N;
          for (let j = 0; j < N; j++) {
            if (causal && t > j) F[row + j] = -Infinity;
            else if (F[row + j] > most[j]) most[j] = F[row + j];
          }
        }
        for (let i = maps, t = 0; t < T; t++) for (let j = 0; j < N; j++, i++) sums[j] += F[i] = Math.exp(F[i] - most[j]);
        if (into) for (let i = maps, t = 0; t < T; t++) for (let j = 0; j < N; j++, i++) into[N][t * N + j] += F[i] / sums[j];
        const said = mul(v + from * T, maps, d, T, N, 0, out + from * N);
        for (let i = said, c = 0; c < d; c++) for (let j = 0; j < N; j++, i++) F[i] /= sums[j];
      }
    });
    return out;
  }

  // ---- text
  let bpe = null;
  function setTokenizer({ vocab, merges, words }) {
    bpe = { vocab, ranks: new Map(merges.map((pair, i) => [pair.join(" "), i])), words: new Set(words) };
  }
  const wordsOf = (prompt) => prompt.normalize("NFC").toLowerCase().match(/'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+/gu) || [];
  const unknown = (prompt) => wordsOf(prompt).filter((word) => !bpe.words.has(word));
  function pieces(word) {
    const parts = [...word];
    parts[parts.length - 1] += "</w>";
    for (;;) { // join the pair that was learned first
      const rank = (i) => bpe.ranks.get(parts[i] + " " + parts[i + 1]) ?? Infinity;
      let best = 0;
      for (let i = 1; i < parts.length - 1; i++) if (rank(i) < rank(best)) best = i;
      if (parts.length < 2 || rank(best) === Infinity) break;
      parts.splice(best, 2, parts[best] + parts[best + 1]);
    }
    return parts.map((part) => bpe.vocab[part]);
  }
  function tokens(prompt) {
    const ids = wordsOf(prompt).flatMap(pieces);
    const start = bpe.vocab["<|startoftext|>"], end = bpe.vocab["<|endoftext|>"], T = shapes["text.embeddings.position_embedding.weight"][0];
    return [start, ...ids.slice(0, T - 2), ...Array(T).fill(end)].slice(0, T);
  }

  function encode(prompt) { // -> [128, 24], a copy
    return within(() => {
      const ids = tokens(prompt), T = ids.length, [, D] = shapes["text.embeddings.token_embedding.weight"];
      let x = take(D * T);
      const word = W["text.embeddings.token_embedding.weight"], place = W["text.embeddings.position_embedding.weight"];
      ids.forEach((id, t) => { for (let c = 0; c < D; c++) F[x + c * T + t] = F[word + id * D + c] + F[place + t * D + c]; });
      for (let n = 0; W[`text.encoder.layers.${n}.layer_norm1.weight`]; n++) {
        const layer = `text.encoder.layers.${n}.`, h = layerNorm(x, layer + "layer_norm1", T);
        const [q, k, v] = ["q", "k", "v"].map((which) => linear(h, `${layer}self_attn.${which}_proj`, T));
        add(x, linear(attend(q, k, v, D, T, T, 4, true), layer + "self_attn.out_proj", T), D * T);
        const inner = linear(layerNorm(x, layer + "layer_norm2", T), layer + "mlp.fc1", T);
        for (let i = 0; i < wide(layer + "mlp.fc1") * T; i++) F[inner + i] /= 1 + Math.exp(-1.702 * F[inner + i]);
        add(x, linear(inner, layer + "mlp.fc2", T), D * T);
      }
      const out = layerNorm(x, "text.final_layer_norm", T);
      return F.slice(out, out + D * T);
    });
  }

  // ---- the denoiser
  function erf(x) { // Abramowitz and Stegun 7.1.26: off by 1.5e-7 at most
    const t = 1 / (1 + 0.3275911 * Math.abs(x));
    const y = 1 - ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t * Math.exp(-x * x);
    return x < 0 ? -y : y;
  }

  function resnet(x, name, size, groups, eps, time) {
    const N = size * size, out = wide(name + ".conv1");
    let more = bias(name + ".conv1");
    if (time) { // what moment it is, added to each channel
      const own = time(name + ".time_emb_proj");
      add(own, more, out);
      more = own;
    }
    const h = conv(groupNorm(x, name + ".norm1", N, groups, eps, true), name + ".conv1", size, 1, more);
    const y = conv(groupNorm(h, name + ".norm2", N, groups, eps, true), name + ".conv2", size);
    return add(y, W[name + ".conv_shortcut.weight"] ? conv(x, name + ".conv_shortcut", size) : x, out * N);
  }

  function transformer(x, name, size, text) {
    const N = size * size, C = wide(name + ".norm"), block = name + ".transformer_blocks.0.", T = 24;
    const h = conv(groupNorm(x, name + ".norm", N, 32, 1e-6, false), name + ".proj_in", size);
    for (const which of ["attn1", "attn2"]) {
      const own = layerNorm(h, block + (which === "attn1" ? "norm1" : "norm2"), N);
      const [other, M] = which === "attn1" ? [own, N] : [text, T];
      const q = linear(own, block + which + ".to_q", N), k = linear(other, block + which + ".to_k", M), v = linear(other, block + which + ".to_v", M);
      add(h, linear(attend(q, k, v, C, N, M, 4, false, which === "attn2" ? heard : null), block + which + ".to_out.0", N), C * N);
    }
    const both = linear(layerNorm(h, block + "norm3", N), block + "ff.net.0.proj", N), wideN = 4 * C * N;
    for (let i = 0; i < wideN; i++) { const gate = F[both + wideN + i]; F[both + i] *= 0.5 * gate * (1 + erf(gate * Math.SQRT1_2)); }
    add(h, linear(both, block + "ff.net.2", N), C * N);
    return add(conv(h, name + ".proj_out", size), x, C * N);
  }

  function denoise(latents, t, text) { // latents Float32Array(4 * 16 * 16), text as encode() gives it -> the noise in it
    return within(() => {
      const D = shapes["unet.time_embedding.linear_1.weight"][1], put = (values) => { const at = take(values.length); F.set(values, at); return at; };
      const column = (values) => { // one column of numbers, widened to eight for `mul`
        const at = take(values.length * 8);
        values.forEach((v, c) => { F[at + c * 8] = v; });
        return at;
      };
      const first = (x, n, act) => Array.from({ length: n }, (_, c) => (act ? silu(F[x + c * 8]) : F[x + c * 8]));
      const waves = Array.from({ length: D }, (_, i) => (i < D / 2 ? Math.cos : Math.sin)(t * Math.exp(-Math.log(10000) * (i % (D / 2)) / (D / 2))));
      const inner = first(linear(column(waves), "unet.time_embedding.linear_1", 8), 256, true);
      const moment = column(first(linear(column(inner), "unet.time_embedding.linear_2", 8), 256, true));
      const time = (name) => put(first(linear(moment, name, 8), wide(name)));
      const words = put(text);
      const res = (x, name, size) => resnet(x, "unet." + name, size, 32, 1e-5, time);
      const look = (x, name, size) => transformer(x, "unet." + name, size, words);
      const beside = (x, y, n, m) => { const at = take(n + m); F.copyWithin(at, x, x + n); F.copyWithin(at + n, y, y + m); return at; };

      const s0 = conv(put(latents), "unet.conv_in", 16);
      const s1 = look(res(s0, "down_blocks.0.resnets.0", 16), "down_blocks.0.attentions.0", 16);
      const s2 = conv(s1, "unet.down_blocks.0.downsamplers.0.conv", 16, 2);
      const s3 = look(res(s2, "down_blocks.1.resnets.0", 8), "down_blocks.1.attentions.0", 8);
      let x = look(res(s3, "mid_block.resnets.0", 8), "mid_block.attentions.0", 8);
      x = res(x, "mid_block.resnets.1", 8);
      x = look(res(beside(x, s3, 8192, 8192), "up_blocks.0.resnets.0", 8), "up_blocks.0.attentions.0", 8);
      x = look(res(beside(x, s2, 8192, 4096), "up_blocks.0.resnets.1", 8), "up_blocks.0.attentions.1", 8);
      x = conv(twice(x, 128, 8), "unet.up_blocks.0.upsamplers.0.conv", 16);
      x = look(res(beside(x, s1, 32768, 16384), "up_blocks.1.resnets.0", 16), "up_blocks.1.attentions.0", 16);
      x = look(res(beside(x, s0, 16384, 16384), "up_blocks.1.resnets.1", 16), "up_blocks.1.attentions.1", 16);
      const out = conv(groupNorm(x, "unet.conv_norm_out", 256, 32, 1e-5, true), "unet.conv_out", 16);
      return F.slice(out, out + 1024);
    });
  }

  // ---- from latents to pixels
  function twice(x, channels, size) { // every place becomes four
    const out = take(4 * channels * size * size), w = 2 * size;
    for (let c = 0; c < channels; c++) for (let i = 0; i < w; i++) for (let j = 0; j < w; j++) F[out + (c * w + i) * w + j] = F[x + (c * size + (i >> 1)) * size + (j >> 1)];
    return out;
  }

  function decode(latents) { // -> RGBA bytes of 64 x 64
    return within(() => {
      const res = (x, name, size) => resnet(x, "vae.decoder." + name, size, 16, 1e-6);
      let x = take(1024), size = 16;
      F.set(latents.map((v) => v / 0.23853), x);
      x = conv(conv(x, "vae.post_quant_conv", size), "vae.decoder.conv_in", size);
      x = res(res(x, "mid_block.resnets.0", size), "mid_block.resnets.1", size);
      for (let block = 0; block < 3; block++) {
        const name = `up_blocks.${block}.`, channels = wide(`vae.decoder.${name}resnets.1.conv2`);
        x = res(res(x, name + "resnets.0", size), name + "resnets.1", size);
        if (block < 2) { x = conv(twice(x, channels, size), `vae.decoder.${name}upsamplers.0.conv`, 2 * size); size *= 2; }
      }
      const N = size * size, rgb = conv(groupNorm(x, "vae.decoder.conv_norm_out", N, 16, 1e-6, true), "vae.decoder.conv_out", size);
      const out = new Uint8ClampedArray(4 * N).fill(255);
      for (let c = 0; c < 3; c++) for (let i = 0; i < N; i++) out[4 * i + c] = 255 * (F[rgb + c * N + i] / 2 + 0.5);
      return out;
    });
  }

  // ---- noise of a seed: what torch.randn draws (Mersenne twister, then Box and Muller on blocks of sixteen)
  function noise(seed, n = 1024) {
    const s = new Uint32Array(624);
    s[0] = seed;
    for (let i = 1; i < 624; i++) { const x = s[i - 1] ^ (s[i - 1] >>> 30); s[i] = Math.imul(1812433253, x) + i; }
    let at = 624;
    const next = () => {
      if (at === 624) {
        for (let i = 0; i < 624; i++) {
          const y = (s[i] & 0x80000000) | (s[(i + 1) % 624] & 0x7fffffff);
          s[i] = s[(i + 397) % 624] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
        }
        at = 0;
      }
      let y = s[at++];
      y ^= y >>> 11; y ^= (y << 7) & 0x9d2c5680; y ^= (y << 15) & 0xefc60000; y ^= y >>> 18;
      return (y & 0xffffff) / 2 ** 24;
    };
    const out = Float32Array.from({ length: n }, next);
    for (let i = 0; i < n; i += 16) for (let j = i; j < i + 8; j++) {
      const radius = Math.sqrt(-2 * Math.log(1 - out[j])), angle = 2 * Math.PI * out[j + 8];
      out[j] = radius * Math.cos(angle); out[j + 8] = radius * Math.sin(angle);
    }
    return out;
  }

  /* Where each word was listened to, as `trace.word` says it: the mean over heads, layers and steps, 16 x 16; coarse maps
     are enlarged between their places. A word that comes twice counts once. */
  function mapsOf(prompt, { 64: coarse, 256: fine }, steps) {
    const near = (v) => { const f = (v + 0.5) / 2 - 0.5, i = Math.floor(f); return [Math.max(i, 0), Math.min(i + 1, 7), f - i]; };
    const found = {};
    let at = 1;
    for (const word of wordsOf(prompt)) {
      const map = (found[word] ||= new Float32Array(256));
      for (const end = Math.min(at + pieces(word).length, 23); at < end; at++) for (let i = 0; i < 256; i++) {
        const [y, below, down] = near(i >> 4), [x, beside, right] = near(i & 15), place = (r, c) => coarse[at * 64 + 8 * r + c];
        const upper = place(y, x) * (1 - right) + place(y, beside) * right, lower = place(below, x) * (1 - right) + place(below, beside) * right;
        map[i] += (fine[at * 256 + i] + upper * (1 - down) + lower * down) / (7 * 4 * steps); // layers, heads
      }
    }
    return found;
  }

  /* DPM-Solver++ (second order, midpoint), as the pipeline's scheduler does it. At each step it yields what the model
     takes for the finished picture by then (latents; the last ones are the picture), and where the words were listened to so far. */
  function* sample(prompt, seed, steps, guidance) {
    const alphas = [], from = Math.sqrt(0.00085), to = Math.sqrt(0.012);
    for (let i = 0, product = 1; i < 1000; i++) alphas.push(product *= 1 - (from + (i / 999) * (to - from)) ** 2);
    const times = Array.from({ length: steps }, (_, i) => Math.round((999 * (steps - i)) / steps));
    const sigma = [...times.map((t) => Math.sqrt((1 - alphas[t]) / alphas[t])), 0]; // noise, as a share of the picture
    const alpha = sigma.map((s) => 1 / Math.sqrt(s * s + 1)), lambda = sigma.map((s) => -Math.log(s));
    const x = noise(seed), asked = encode(prompt), nothing = encode("");
    const listened = { 64: new Float32Array(24 * 64), 256: new Float32Array(24 * 256) };
    let before = null;
    for (let i = 0; i < steps; i++) {
      heard = listened;
      const eps = denoise(x, times[i], asked);
      heard = null;
      const free = denoise(x, times[i], nothing);
      const clean = x.map((v, k) => v / alpha[i] - sigma[i] * (free[k] + guidance * (eps[k] - free[k])));
      const h = lambda[i + 1] - lambda[i], grow = alpha[i + 1] * (1 - Math.exp(-h));
      const ahead = before && i < steps - 1 ? (0.5 * h) / (lambda[i] - lambda[i - 1]) : 0;
      const keep = (sigma[i + 1] * alpha[i + 1]) / (sigma[i] * alpha[i]);
      for (let k = 0; k < x.length; k++) x[k] = keep * x[k] + grow * (clean[k] + (ahead ? ahead * (clean[k] - before[k]) : 0));
      before = clean;
      yield { clean, maps: mapsOf(prompt, listened, i + 1) };
    }
  }

  // ---- forgetting: duge_lite/solver.py, from what the layers saw while the base model drew
  let book = null;
  const base = {}; // the output matrices of the base model, by layer
  const outputOf = (layer) => `unet.${layer}.to_out.0.weight`;
  function setBook({ about, states }) {
    book = { ...about, seen: safetensors(bytesOf(states)) };
    for (const layer of book.layers) base[layer] = F.slice(W[outputOf(layer)], W[outputOf(layer)] + wide(`unet.${layer}.to_out.0`) ** 2);
  }
  function use(weights) { for (const layer in base) F.set((weights || base)[layer], W[outputOf(layer)]); } // null: the base model

  /* What is asked instead of every prompt that is to go, and the prompts that are to stay. */
  function wishes(names) {
    const steps = new Map(), ends = new Map();
    for (const name of [...names].sort()) {
      const { asks, instead, nearest } = book.concepts[name], near = nearest.find((other) => !names.includes(other));
      if (!instead && !near) throw Error("Something has to stay: choose fewer.");
      asks.forEach((prompt, i) => { if (!steps.has(prompt)) steps.set(prompt, instead ? instead[i] : book.concepts[near].asks[i]); });
    }
    for (const prompt of steps.keys()) {
      let end = prompt;
      while (steps.has(end)) end = steps.get(end); // "a neon sign of an apple", "... of an orange", "a photo of an orange"
      ends.set(prompt, end);
    }
    const stay = book.prompts.filter((prompt) => !ends.has(prompt) && !names.some((name) => book.concepts[name].named.includes(prompt)));
    if (!stay.length) throw Error("Something has to stay: choose fewer.");
    return { ends, stay };
  }

  const texts = new Map(); // encoded once
  const textOf = (prompt) => { if (!texts.has(prompt)) texts.set(prompt, encode(prompt)); return texts.get(prompt); };

  function solved(O, S, D, C) { // O + O D (S + r)^-1, by Cholesky's S + r = L L^T
    let trace = 0;
    for (let i = 0; i < C; i++) trace += S[i * C + i];
    const L = S.slice(), out = O.slice(), y = new Float64Array(C);
    for (let i = 0; i < C; i++) L[i * C + i] += (book.ridge * trace) / C;
    for (let i = 0; i < C; i++) for (let j = 0; j <= i; j++) {
      let v = L[i * C + j];
      for (let k = 0; k < j; k++) v -= L[i * C + k] * L[j * C + k];
      L[i * C + j] = i === j ? Math.sqrt(v) : v / L[j * C + j];
    }
    for (let row = 0; row < C; row++) {
      for (let j = 0; j < C; j++) { y[j] = 0; for (let k = 0; k < C; k++) y[j] += O[row * C + k] * D[k * C + j]; }
      for (let j = 0; j < C; j++) { for (let k = 0; k < j; k++) y[j] -= L[j * C + k] * y[k]; y[j] /= L[j * C + j]; }
      for (let j = C - 1; j >= 0; j--) { for (let k = j + 1; k < C; k++) y[j] -= L[k * C + j] * y[k]; y[j] /= L[j * C + j]; }
      for (let j = 0; j < C; j++) out[row * C + j] += y[j];
    }
    return out;
  }

  /* The new output matrices, a layer at a time. The three losses have their minimum at O = O0 (X + r) (S + r)^-1 with
     S = sum f f^T over all places and X = sum f* f^T; where something stays f* = f, so that X - S is D = sum (f* - f) f^T
     over the places of what goes. */
  function* forget(names) {
    const { ends, stay } = wishes(names), out = {};
    for (const layer of book.layers) {
      out[layer] = within(() => {
        const C = wide(`unet.${layer}.to_out.0`), states = book.seen[layer], R = states.shape[2], scale = book.seen[layer + " scale"].data;
        const S = new Float64Array(C * C), D = new Float64Array(C * C);
        const said = (hidden, prompt) => { // what the heads say there: [C, R]
          const text = take(24 * 128);
          F.set(textOf(prompt), text);
          const q = linear(hidden, `unet.${layer}.to_q`, R), k = linear(text, `unet.${layer}.to_k`, 24), v = linear(text, `unet.${layer}.to_v`, 24);
          return attend(q, k, v, C, R, 24, 4, false);
        };
        const collect = (sum, g, fT) => { const product = mul(g, fT, C, R, C); for (let i = 0; i < C * C; i++) sum[i] += F[product + i]; };
        for (const prompt of [...ends.keys(), ...stay]) within(() => {
          const hidden = take(C * R), fT = take(C * R), from = book.prompts.indexOf(prompt) * C * R;
          for (let i = 0; i < C * R; i++) F[hidden + i] = states.data[from + i] * scale[(i / R) | 0];
          const f = said(hidden, prompt);
          for (let c = 0; c < C; c++) for (let r = 0; r < R; r++) F[fT + r * C + c] = F[f + c * R + r];
          collect(S, f, fT);
          if (!ends.has(prompt)) return;
          const g = said(hidden, ends.get(prompt)); // f* = g + eta (g - f): past what is asked instead
          for (let i = 0; i < C * R; i++) F[g + i] += book.eta * (F[g + i] - F[f + i]) - F[f + i];
          collect(D, g, fT);
        });
        return solved(base[layer], S, D, C);
      });
      yield layer;
    }
    return out;
  }

  return { load, setTokenizer, tokens, unknown, encode, denoise, decode, noise, sample, setBook, forget, use, means: () => means };
}
if (typeof module !== "undefined") module.exports = dugeEngine;
