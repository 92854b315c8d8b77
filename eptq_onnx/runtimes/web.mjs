// Runs models in onnxruntime-web or onnxruntime-node, as web.py asks on standard input: one line of JSON each.
// Answers are lines with a prefix, because onnxruntime-web prints its profile to standard output.
import { createRequire } from 'node:module';
import { createInterface } from 'node:readline';
import fs from 'node:fs';
import path from 'node:path';

const MARK = '\u001eeptq';
const ARRAYS = {
  float32: Float32Array, float64: Float64Array, int8: Int8Array, uint8: Uint8Array, int16: Int16Array,
  uint16: Uint16Array, int32: Int32Array, uint32: Uint32Array, int64: BigInt64Array, uint64: BigUint64Array,
  bool: Uint8Array, float16: globalThis.Float16Array ?? Uint16Array,
};
const [folder, kind] = process.argv.slice(2);
const ort = createRequire(path.join(folder, 'package.json'))(kind);
const web = kind === 'onnxruntime-web';
let session, feeds;

function resident() {
  // The peak that Node reports may be that of the process that started it.
  if (process.platform !== 'linux') return process.resourceUsage().maxRSS * 1024;
  return Number(/VmHWM:\s+(\d+)/.exec(fs.readFileSync('/proc/self/status', 'utf8'))[1]) * 1024;
}

async function timed(act) {
  const cpu = process.cpuUsage(), wall = performance.now();
  const value = await act();
  const spent = process.cpuUsage(cpu);
  return [value, { cpu: (spent.user + spent.system) * 1e-6, wall: (performance.now() - wall) * 1e-3 }];
}

const acts = {
  async load({ model, external, threads, profile, optimized }) {
    const options = { executionProviders: [web ? 'wasm' : 'cpu'], logSeverityLevel: 4 };
    if (threads) options.intraOpNumThreads = threads;
    if (web && threads) ort.env.wasm.numThreads = threads;
    if (profile) Object.assign(options, { enableProfiling: true, profileFilePrefix: profile });
    if (optimized) options.optimizedModelFilePath = optimized;
    const before = process.memoryUsage().rss;
    const [made, seconds] = await timed(async () => {
      if (!web) return ort.InferenceSession.create(model, options);
      if (external.length) options.externalData = external.map((e) => ({ path: e.name, data: fs.readFileSync(e.file) }));
      return ort.InferenceSession.create(fs.readFileSync(model), options);
    });
    session = made;
    return { ...seconds, bytes: Math.max(resident() - before, 0) };
  },
  async feed({ values }) {
    feeds = {};
    for (const { name, type, dims, file } of values) {
      const bytes = fs.readFileSync(file);
      const buffer = bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength);
      feeds[name] = new ort.Tensor(type, new ARRAYS[type](buffer), dims);
    }
    return {};
  },
  async time() {
    return (await timed(() => session.run(feeds)))[1];
  },
  async run({ into }) {
    const results = await session.run(feeds);
    return {
      values: session.outputNames.map((name, k) => {
        const { type, dims, data } = results[name];
        if (!(type in ARRAYS)) throw new Error(`the output ${name} has the type ${type}`);
        const file = path.join(into, `${k}.bin`);
        fs.writeFileSync(file, new Uint8Array(data.buffer, data.byteOffset, data.byteLength));
        return { name, type, dims, file };
      }),
    };
  },
  async end() {
    session.endProfiling();
    return {};
  },
};

function answer(value) {
  fs.writeSync(1, `\n${MARK}${JSON.stringify(value)}\n`);
}

answer({});
for await (const line of createInterface({ input: process.stdin })) {
  const { act, ...given } = JSON.parse(line);
  try {
    answer(await acts[act](given));
  } catch (error) {
    answer({ error: String(error?.message ?? error) });
  }
}
process.exit(0);
