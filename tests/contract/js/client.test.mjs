// A client of the mesh in another language, from its first line to the last of an episode.
//
// It needs three things: NATS, msgpack, and ../../../schemas. MESHRL_URL says where the server is; a worker must serve
// the env "cartpole" there (tests/contract/test_js.py starts both).

import assert from "node:assert/strict";
import { randomBytes } from "node:crypto";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import { connect, createInbox } from "@nats-io/transport-node";
import { decode, encode } from "@msgpack/msgpack";

// ---------------------------------------------------------------- values

// Arrays travel as maps: byte order, kind and size of the items, shape, and the items' bytes in C order.
const TYPED_ARRAYS = {
  "|b1": Uint8Array,
  "|u1": Uint8Array,
  "|i1": Int8Array,
  "<u2": Uint16Array,
  "<i2": Int16Array,
  "<u4": Uint32Array,
  "<i4": Int32Array,
  "<u8": BigUint64Array,
  "<i8": BigInt64Array,
  "<f4": Float32Array,
  "<f8": Float64Array,
};

function arrayOf(form) {
  const TypedArray = TYPED_ARRAYS[form.type];
  if (TypedArray === undefined) throw new Error(`arrays of ${form.type} are not needed here`);
  // A copy, since a typed array must begin where its items are aligned. Not by slice: of Node's Buffers that is a view.
  const data = Uint8Array.from(form.data);
  const items = new TypedArray(data.buffer, 0, data.byteLength / TypedArray.BYTES_PER_ELEMENT);
  if (!form.nd) return items[0]; // a NumPy scalar
  const count = form.shape.reduce((product, length) => product * length, 1);
  if (count !== items.length) throw new Error(`${items.length} items for an array of shape ${form.shape}`);
  return { dtype: form.type, shape: form.shape, items };
}

// What a plain msgpack decoder gave, with the forms of ../../../schemas/v1/messages/value.json made into values.
function revive(value) {
  if (Array.isArray(value)) return value.map(revive);
  if (value === null || typeof value !== "object" || value instanceof Uint8Array) return value;
  if ("nd" in value) return arrayOf(value);
  if (value.py === "tuple") return value.v.map(revive);
  if ("py" in value || "complex" in value) throw new Error(`no need for ${value.py ?? "complex"} here`);
  return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, revive(item)]));
}

// An array of whole numbers as it is written: lanes and sequence numbers of pools, and actions of discrete spaces.
function int64s(numbers) {
  const data = new Uint8Array(BigInt64Array.from(numbers, BigInt).buffer);
  return { nd: true, type: "<i8", kind: "", shape: [numbers.length], data };
}

// The items of an array of whole numbers, which are small here.
const numbersOf = (array) => Array.from(array.items, Number);

// One row of a batch of a box: the value of sub-environment i.
function rowOf({ dtype, shape, items }, i) {
  const size = items.length / shape[0];
  return { dtype, shape: shape.slice(1), items: items.slice(i * size, (i + 1) * size) };
}

// Infos of a vector or a pool as [index, info], whichever of its forms a worker chose (a vector implementation's is left
// out here: it has arrays by key already).
function entriesOf(infos, count) {
  if (infos?.columns === undefined) return infos?.entries ?? [];
  const at = infos.at ? numbersOf(infos.at) : Array.from({ length: count }, (_, i) => i);
  const group = infos.group ? numbersOf(infos.group) : at.map(() => 0);
  const rows = infos.columns.map(() => 0); // of each group, how many were read
  return at.map((index, entry) => [index, infoOf(infos.columns[group[entry]], rows[group[entry]]++)]);
}

function infoOf(columns, row) {
  const read = { map: infoOf, array: rowOf, object: (values) => values[row] };
  const value = ([kind, values]) => (read[kind] ?? ((array) => array.items[row]))(values, row);
  return Object.fromEntries(Object.entries(columns).map(([key, column]) => [key, value(column)]));
}

// ---------------------------------------------------------------- the mesh

// A name as one token of a subject: NATS gives dots, stars and blanks a meaning.
function token(text) {
  const escape = (byte) => `%${byte.toString(16).toUpperCase().padStart(2, "0")}`;
  const written = (character) => Array.from(new TextEncoder().encode(character), escape).join("");
  return Array.from(text, (c) => (/^[A-Za-z0-9_\-/:@+=]$/.test(c) ? c : written(c))).join("");
}

// What a worker answers in place of a reply. The code is for programs, the message for people.
class MeshError extends Error {
  constructor({ code, message, details = {} }) {
    super(message);
    this.code = code;
    this.details = details;
  }
}

function checked(data) {
  const body = revive(decode(data));
  if (body.error !== undefined) throw new MeshError(body.error);
  return body;
}

class Mesh {
  static async connect(address, namespace = "default") {
    const url = new URL(address);
    const [user, pass] = [decodeURIComponent(url.username), decodeURIComponent(url.password)];
    const connection = await connect({ servers: url.host, ...(user && { user, pass }) });
    return new Mesh(connection, token(user || "anon"), `meshrl.v1.${token(namespace)}.`);
  }

  constructor(connection, user, prefix) {
    Object.assign(this, { connection, user, prefix });
  }

  // One request and the bytes of its answer. "No responders" rejects at once: nobody listens there.
  async ask(subject, body) {
    const answer = await this.connection.request(this.prefix + subject, encode(body), { timeout: 10_000 });
    return answer.data;
  }

  // Every worker answers with what it serves; this takes the first that serves the name.
  async discover(name) {
    const known = checked(await this.ask("registry.ask", { v: 1, kind: "env", name }));
    return known.descriptions.find((description) => description.name === name);
  }

  // Open a session at one worker. The client chooses the session's id, so that asking again is safe.
  // asked: more fields, such as form and num_envs.
  async open(description, { kwargs = {}, ...asked } = {}) {
    const { name, worker } = description;
    const session = randomBytes(8).toString("hex");
    const open = { v: 1, session, name, kwargs, park_s: 5.0, ...asked };
    const answer = checked(await this.ask(`worker.${worker}.open.${this.user}`, open));
    if (answer.session === undefined) throw new Error(`worker ${worker} is full: ${JSON.stringify(answer.load)}`);
    const env = asked.form === "pool" ? new Pool(this, answer, asked.num_envs) : new Session(this, answer);
    await env.renew(); // at once: a grant that is neither renewed nor used lapses after grant_s
    env.renewing = setInterval(() => env.renew(), (answer.lease_s / 3) * 1000);
    return env;
  }

  close() {
    return this.connection.close();
  }
}

class Session {
  seq = 0; // rises by one a request, errors included

  constructor(mesh, grant) {
    Object.assign(this, { mesh, grant });
    this.subject = `session.${grant.worker}.${mesh.user}.${grant.session}`;
  }

  // The bytes of an answer; the same seq again gets the same bytes, and runs nothing.
  send(op, seq, fields = {}) {
    return this.mesh.ask(`${this.subject}.${op}`, { epoch: this.grant.epoch, lane: 0, seq, ...fields });
  }

  async request(op, fields) {
    this.seq += 1;
    const reply = checked(await this.send(op, this.seq, fields));
    assert.equal(reply.seq, this.seq);
    return reply;
  }

  async renew() {
    const { worker, session, epoch } = this.grant;
    const body = { v: 1, sessions: [[session, epoch]] };
    const { lost = [] } = checked(await this.mesh.ask(`worker.${worker}.renew.${this.mesh.user}`, body));
    if (lost.length > 0) throw new Error(`session ${session} is lost: ${lost[0][1]}`);
  }

  async close() {
    clearInterval(this.renewing);
    return checked(await this.mesh.ask(`${this.subject}.close`, { v: 1, epoch: this.grant.epoch }));
  }
}

// Sub-environments that are a lane each. Answers come as the lanes finish, each naming some of them, maybe twice.
class Pool extends Session {
  ready = []; // results that were not received yet, one a lane
  awake = () => {};

  constructor(mesh, grant, count) {
    super(mesh, grant);
    this.seqs = new Array(count).fill(0); // of the last request on each lane
    this.waiting = new Map(); // lane: the seq whose answer is awaited
    this.inbox = createInbox();
    this.answers = mesh.connection.subscribe(this.inbox, { callback: (_, message) => this.land(message) });
  }

  // The request of some lanes; what has an answer already is left out when it is sent again.
  publish(op, lanes, fields) {
    const named = { lanes: int64s(lanes), seqs: int64s(lanes.map((lane) => this.seqs[lane])) };
    const body = encode({ epoch: this.grant.epoch, ...named, ...fields });
    this.mesh.connection.publish(`${this.mesh.prefix}${this.subject}.${op}`, body, { reply: this.inbox });
  }

  begin(op, lanes, fields) {
    for (const lane of lanes) this.waiting.set(lane, (this.seqs[lane] += 1));
    this.publish(op, lanes, fields);
  }

  land(message) {
    const told = revive(decode(message.data));
    const lanes = told.lanes && numbersOf(told.lanes);
    const seqs = told.seqs && numbersOf(told.seqs);
    if (told.error !== undefined) this.ready.push({ error: new MeshError(told.error), lanes, seqs });
    else
      lanes.forEach((lane, i) => {
        if (this.waiting.get(lane) !== seqs[i]) return; // a second answer to what was sent again
        this.waiting.delete(lane);
        const [reward] = told.rewards.items.slice(i, i + 1);
        const [episode, steps] = [told.episodes, told.steps].map((array) => numbersOf(array)[i]);
        this.ready.push({ lane, obs: rowOf(told.obs, i), reward, first: told.first, episode, steps });
      });
    this.awake();
  }

  // The next count results, in the order in which they came.
  async receive(count) {
    while (this.ready.length < count) await new Promise((resolve) => (this.awake = resolve));
    return this.ready.splice(0, count);
  }

  close() {
    this.answers.unsubscribe();
    return super.close();
  }
}

// ---------------------------------------------------------------- spaces

// One number stands for an array of them; infinities are text.
function bound(numbers, index) {
  const number = Array.isArray(numbers) ? numbers[index] : numbers;
  return { inf: Infinity, "-inf": -Infinity }[number] ?? number;
}

function checkBox(space, array) {
  assert.equal(space.space, "box");
  assert.equal(array.dtype, space.dtype);
  assert.deepEqual(array.shape, space.shape);
  array.items.forEach((item, index) => {
    assert.ok(bound(space.low, index) <= item && item <= bound(space.high, index), `${item} is out of bounds`);
  });
}

// ---------------------------------------------------------------- the proof

test("an episode, from discovery to close", async (t) => {
  const mesh = await Mesh.connect(process.env.MESHRL_URL);
  t.after(() => mesh.close());

  const description = await mesh.discover("cartpole");
  assert.equal(description.action_space.space, "discrete");
  const env = await mesh.open(description);
  t.after(() => clearInterval(env.renewing));
  assert.equal(env.grant.epoch, 1);
  assert.equal(env.grant.description.name, "cartpole");

  // An error has a code, uses up its seq, and does no harm.
  await assert.rejects(env.request("step", { action: 0 }), { code: "reset_needed" });

  const first = await env.request("reset", { seed: 7 });
  assert.ok(first.obs.items instanceof Float32Array);
  checkBox(description.observation_space, first.obs);

  let [steps, rewards, last] = [0, 0, null];
  do {
    last = await env.request("step", { action: steps % description.action_space.n });
    checkBox(description.observation_space, last.obs);
    assert.equal(typeof last.terminated, "boolean");
    rewards += last.reward;
    steps += 1;
  } while (!last.terminated && !last.truncated);
  assert.ok(steps > 5);
  assert.equal(rewards, steps);

  // The last step again: the same bytes, and no other step.
  const request = { action: (steps - 1) % description.action_space.n };
  const again = [await env.send("step", env.seq, request), await env.send("step", env.seq, request)];
  assert.deepEqual(again[0], again[1]);
  assert.deepEqual(checked(again[0]), last);
  const { state } = await env.request("state");
  assert.deepEqual([state.phase, state.steps, state.episode_return, state.seed], ["ended", steps, rewards, 7]);

  // The same seed is the same episode.
  assert.deepEqual((await env.request("reset", { seed: 7 })).obs, first.obs);

  // Out of order: told by code, and nothing was run.
  const gap = await env.send("step", env.seq + 2, { action: 0 });
  assert.throws(() => checked(gap), { code: "sequence_gap" });
  const stale = await env.send("step", 1, { action: 0 });
  assert.throws(() => checked(stale), { code: "stale_request" });
  assert.equal((await env.request("state")).state.steps, 0);

  assert.deepEqual(await env.close(), { v: 1, existed: true });
  await assert.rejects(env.request("step", { action: 0 }), { code: "session_unknown" });
});

test("a vector: sub-environments that are stepped together", async (t) => {
  const mesh = await Mesh.connect(process.env.MESHRL_URL);
  t.after(() => mesh.close());
  const description = await mesh.discover("cartpole");
  assert.equal(description.vectors.pool ?? true, true);
  const seeds = [7, 8, 9];
  const shard = await mesh.open(description, { form: "vector", num_envs: 3, autoreset_mode: "SameStep" });
  t.after(() => clearInterval(shard.renewing));
  const first = await shard.request("reset", { seeds });
  assert.deepEqual([first.obs.dtype, first.obs.shape], ["<f4", [3, 4]]);

  // Each is what a single env of that seed is.
  const single = await mesh.open(description);
  t.after(() => clearInterval(single.renewing));
  assert.deepEqual(rowOf(first.obs, 1), (await single.request("reset", { seed: seeds[1] })).obs);

  let [step, alone] = [null, null];
  do {
    step = await shard.request("step", { actions: int64s([0, 1, 0]) });
    alone = await single.request("step", { action: 1 });
    assert.deepEqual(Array.from(step.rewards.items), [1, 1, 1]);
    assert.equal(step.terminations.items[1], Number(alone.terminated));
  } while (!alone.terminated);

  // It has ended, and was reset at once: the last observation is among the infos, in the order of sub-environments.
  const told = entriesOf(step.infos, 3).filter(([index]) => index === 1);
  assert.deepEqual(told[0][1].final_obs, alone.obs);
  assert.notDeepEqual(rowOf(step.obs, 1), alone.obs);

  const gravity = await shard.request("get_attr", { name: "gravity", ids: [2, 0] });
  assert.deepEqual(gravity.values, [9.8, 9.8]);
  await assert.rejects(shard.request("step", { actions: int64s([0, 1]) }), { code: "malformed_message" });
  assert.equal((await shard.close()).existed, true);
  await single.close();
  await assert.rejects(mesh.open(description, { form: "vector", num_envs: 1000 }), { code: "usage" });
});

test("a pool: sub-environments that are stepped in whatever groups they are ready", async (t) => {
  const mesh = await Mesh.connect(process.env.MESHRL_URL);
  t.after(() => mesh.close());
  const pool = await mesh.open(await mesh.discover("cartpole"), { form: "pool", num_envs: 4 });
  t.after(() => clearInterval(pool.renewing));
  const byLane = (results) => results.toSorted((a, b) => a.lane - b.lane).map((result) => result.lane);

  pool.begin("reset", [0, 1, 2, 3], { seeds: [1, 2, 3, 4] });
  const begun = await pool.receive(4);
  assert.deepEqual(byLane(begun), [0, 1, 2, 3]);
  assert.ok(begun.every(({ first, episode, steps }) => first && episode === 1 && steps === 0));

  // Two groups under way at once.
  pool.begin("step", [3, 0], { actions: int64s([1, 0]) });
  pool.begin("step", [1, 2], { actions: int64s([1, 1]) });
  const stepped = await pool.receive(4);
  assert.deepEqual(byLane(stepped), [0, 1, 2, 3]);
  assert.ok(stepped.every(({ first, reward, steps }) => !first && reward === 1 && steps === 1));

  // The same seqs again: what was answered is answered again, nothing runs twice, and what is not awaited is dropped.
  pool.publish("step", [1, 2], { actions: int64s([1, 1]) });
  pool.begin("step", [1], { actions: int64s([0]) });
  const [next] = await pool.receive(1);
  assert.deepEqual([next.lane, next.steps, pool.ready.length], [1, 2, 0]);

  // A seq that skips one is refused on its lane alone.
  pool.seqs[2] += 1;
  pool.begin("step", [2, 3], { actions: int64s([0, 0]) });
  const both = await pool.receive(2);
  const refused = both.find(({ error }) => error !== undefined);
  assert.deepEqual([refused.error.code, refused.lanes, refused.seqs], ["sequence_gap", [2], [4]]);
  assert.deepEqual([both.find(({ error }) => error === undefined).lane], [3]);
  assert.equal((await pool.close()).existed, true);
});

test("a client that keeps no directory opens at whichever worker NATS picks", async (t) => {
  const mesh = await Mesh.connect(process.env.MESHRL_URL);
  t.after(() => mesh.close());
  const open = { v: 1, session: randomBytes(8).toString("hex"), name: "cartpole" };
  const env = new Session(mesh, checked(await mesh.ask(`env.${token("cartpole")}.open.${mesh.user}`, open)));
  assert.deepEqual((await env.request("reset", { seed: 1 })).obs.shape, [4]);
  assert.equal((await env.close()).existed, true);
});

test("what a worker refuses has a code", async (t) => {
  const mesh = await Mesh.connect(process.env.MESHRL_URL);
  t.after(() => mesh.close());
  const description = await mesh.discover("cartpole");
  await assert.rejects(mesh.open({ ...description, name: "no such env" }), { code: "unknown_name" });
  await assert.rejects(mesh.open(description, { kwargs: { gravity: 1 } }), { code: "kwargs_not_allowed" });
  const open = `worker.${description.worker}.open.${mesh.user}`;
  for (const [body, code] of [
    [{ v: 2, session: "s", name: "cartpole" }, "unsupported_version"],
    [{ v: 1, session: "not an id", name: "cartpole" }, "malformed_message"],
  ]) {
    const answer = await mesh.ask(open, body);
    assert.throws(() => checked(answer), { code });
  }
});

test("the golden infos are read, as entries and as columns", () => {
  const file = new URL("../../../schemas/v1/golden/frames.json", import.meta.url);
  const vectors = JSON.parse(readFileSync(file, "utf-8")).filter(({ key_style }) => key_style === "str");
  const read = (name, count) => {
    const { hex } = vectors.find((vector) => vector.name === `vector_step reply with infos as ${name}`);
    return entriesOf(revive(decode(Buffer.from(hex, "hex"))).infos, count);
  };
  const entries = read("entries", 2);
  assert.deepEqual(entries.map(([index, info]) => [index, Object.keys(info)]), [
    [1, ["final_obs", "final_info"]],
    [1, ["lives"]],
  ]);
  const columns = read("columns", 7);
  assert.deepEqual(columns.map(([index]) => index), [0, 1, 2, 3, 4, 5]);
  const { lives, at, who, of } = columns[3][1];
  assert.deepEqual([Number(lives), Array.from(at.items), who, of], [3, [0, 1, 2, 3], "a", { x: 0.5 }]);
  assert.deepEqual(columns.slice(4).map(([, info]) => info), [{ late: 1.5 }, { late: 2.5 }]);
});

test("the golden arrays are read to the byte", () => {
  const file = new URL("../../../schemas/v1/golden/arrays.json", import.meta.url);
  let read = 0;
  for (const { name, key_style, value, hex } of JSON.parse(readFileSync(file, "utf-8"))) {
    const { dtype, shape, data } = value.array ?? {};
    if (key_style !== "str" || !(dtype in TYPED_ARRAYS)) continue;
    const array = revive(decode(Buffer.from(hex, "hex")));
    assert.deepEqual([array.dtype, array.shape], [dtype, shape], name);
    assert.equal(Buffer.from(array.items.buffer).toString("hex"), data, name);
    read += 1;
  }
  assert.ok(read >= Object.keys(TYPED_ARRAYS).length);
});
