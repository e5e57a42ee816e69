// The noise of a seed, as `noise_of_seeds` in Python draws it: the seed is hashed, the hash seeds a Mersenne twister, and
// PyTorch's CPU generator turns its numbers into Gaussian ones by Box and Muller's transform, sixteen at a time.

const rotate = (x, n) => (x >>> n) | (x << (32 - n));

// The first fractional bits of the roots of the first primes, which SHA-256 takes its constants from (FIPS 180-4).
const primes = [];
for (let n = 2; primes.length < 64; n++) if (primes.every((p) => n % p)) primes.push(n);
const fraction = (x) => ((x - Math.floor(x)) * 2 ** 32) | 0;
const CONSTANTS = primes.map((p) => fraction(Math.cbrt(p)));
const START = primes.slice(0, 8).map((p) => fraction(Math.sqrt(p)));

/** First eight bytes of the SHA-256 of a short ASCII text, as two unsigned words. */
function hashText(text) {
  const bytes = new Uint8Array(64);
  if (text.length > 55) throw new RangeError("a text of one block is at most 55 characters long");
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  bytes[text.length] = 0x80;
  const view = new DataView(bytes.buffer);
  view.setUint32(60, 8 * text.length);
  const w = new Int32Array(64);
  for (let i = 0; i < 16; i++) w[i] = view.getInt32(4 * i);
  for (let i = 16; i < 64; i++) {
    const s0 = rotate(w[i - 15], 7) ^ rotate(w[i - 15], 18) ^ (w[i - 15] >>> 3);
    const s1 = rotate(w[i - 2], 17) ^ rotate(w[i - 2], 19) ^ (w[i - 2] >>> 10);
    w[i] = w[i - 16] + s0 + w[i - 7] + s1;
  }
  let [a, b, c, d, e, f, g, h] = START;
  for (let i = 0; i < 64; i++) {
    const s1 = rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25);
    const t1 = (h + s1 + ((e & f) ^ (~e & g)) + CONSTANTS[i] + w[i]) | 0;
    const s0 = rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22);
    const t2 = (s0 + ((a & b) ^ (a & c) ^ (b & c))) | 0;
    [h, g, f, e, d, c, b, a] = [g, f, e, (d + t1) | 0, c, b, a, (t1 + t2) | 0];
  }
  return [(a + START[0]) >>> 0, (b + START[1]) >>> 0];
}

/** MT19937 (Matsumoto and Nishimura 1998): a function that gives the next 32 bits. */
function mersenneTwister(seed) {
  const state = new Uint32Array(624);
  state[0] = seed;
  for (let i = 1; i < 624; i++) state[i] = Math.imul(1812433253, state[i - 1] ^ (state[i - 1] >>> 30)) + i;
  let index = 624;
  return () => {
    if (index === 624) {
      for (let i = 0; i < 624; i++) {
        const y = (state[i] & 0x80000000) | (state[(i + 1) % 624] & 0x7fffffff);
        state[i] = state[(i + 397) % 624] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
      }
      index = 0;
    }
    let y = state[index++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  };
}

/** Unit Gaussian noise of a seed, `count` >= 16 values: what Python draws, to the accuracy of float32. */
function noiseOfSeed(seed, count) {
  if (!Number.isSafeInteger(seed)) throw new RangeError(`a seed is a whole number, got ${seed}`);
  if (count < 16) throw new RangeError(`PyTorch draws fewer than 16 numbers in another way, got ${count}`);
  const [high, low] = hashText(`sample/${seed}`);
  const next = mersenneTwister(((high << 31) | (low >>> 1)) >>> 0); // the hash is halved, and the twister takes 32 bits of it
  const values = Float64Array.from({ length: count }, () => (next() & 0xffffff) / 2 ** 24);
  const fill = (start) => {
    for (let i = start; i < start + 8; i++) {
      const radius = Math.sqrt(-2 * Math.log(1 - values[i]));
      const angle = 2 * Math.PI * values[i + 8];
      values[i] = radius * Math.cos(angle);
      values[i + 8] = radius * Math.sin(angle);
    }
  };
  for (let start = 0; start + 16 <= count; start += 16) fill(start);
  if (count % 16) {
    for (let i = count - 16; i < count; i++) values[i] = (next() & 0xffffff) / 2 ** 24;
    fill(count - 16);
  }
  return Float32Array.from(values);
}

/** The way from noise a to noise b on the sphere, at t in [0, 1]: every point of it is as likely as noise. */
function walkNoise(a, b, t) {
  if (t === 0) return a;
  if (t === 1) return b;
  let dot = 0, aa = 0, bb = 0;
  for (let i = 0; i < a.length; i++) { dot += a[i] * b[i]; aa += a[i] * a[i]; bb += b[i] * b[i]; }
  const angle = Math.acos(Math.max(-1, Math.min(1, dot / Math.sqrt(aa * bb))));
  const sine = Math.sin(angle);
  const [from, to] = sine < 1e-6 ? [1 - t, t] : [Math.sin((1 - t) * angle) / sine, Math.sin(t * angle) / sine];
  return a.map((value, i) => from * value + to * b[i]);
}
