// The answers of a report's runs, for browse(): numbered by set, then test row, then run, so that all answers to one
// input are adjacent. answers.py describes the data.
const data = JSON.parse(at("data").textContent);
const { texts, sets, runs } = data;
// Facts about an answer beside right or wrong, as bits.
const [DISAGREE, ONLY_RIGHT, ONLY_WRONG, ALL_WRONG] = [1, 2, 4, 8];
const BITS = { "disagree": DISAGREE, "only-right": ONLY_RIGHT, "only-wrong": ONLY_WRONG, "all-wrong": ALL_WRONG };

let answers = 0;
for (const run of runs) {
  run.predictions = Int32Array.from(run.predictions);
  run.correct = Uint8Array.from(run.right, (digit) => Number(digit));
  run.bits = new Uint8Array(run.correct.length);
}
for (const set of sets) {
  set.runs = runs.filter((run) => sets[run.set] === set);
  set.first = answers;
  answers += set.ids.length * set.runs.length;
  compareMethods(set);
}
const place = (number) => {
  const set = sets.findLast((each) => each.first <= number && each.ids.length && each.runs.length);
  const within = number - set.first;
  return { set, row: Math.floor(within / set.runs.length), run: set.runs[within % set.runs.length] };
};

// Methods are compared at the same size, share of the data and seed. Two right answers agree, whatever their words.
function compareMethods(set) {
  const cells = new Map();
  for (const run of set.runs) {
    const key = JSON.stringify([run.size, run.fraction, run.seed]);
    cells.set(key, [...(cells.get(key) ?? []), run]);
  }
  for (const cell of cells.values()) {
    if (cell.length < 2) continue;
    for (let row = 0; row < set.ids.length; row++) {
      let right = 0;
      let differ = false;
      for (const run of cell) {
        right += run.correct[row];
        differ ||= run.predictions[row] !== cell[0].predictions[row];
      }
      const bits = (right < cell.length && differ ? DISAGREE : 0) | (right ? 0 : ALL_WRONG);
      for (const run of cell) {
        run.bits[row] = bits | (right === 1 && run.correct[row] ? ONLY_RIGHT : 0)
          | (right === cell.length - 1 && !run.correct[row] ? ONLY_WRONG : 0);
      }
    }
  }
}

// Searched texts are put into lower case once, at the first search.
const lower = () => {
  if (data.lowered) return;
  data.lowered = texts.map((text) => text.toLowerCase());
  data.matches = new Uint8Array(texts.length);
  for (const set of sets) {
    set.lowered = set.ids.map((id, row) => `${id}\n${set.inputs[row]}`.toLowerCase());
    set.matches = new Uint8Array(set.ids.length);
  }
  for (const run of runs) {
    run.lowered = run.said.map((text) => text?.toLowerCase() ?? "");
    run.matches = new Uint8Array(run.said.length);
  }
};
let searched = "";
const search = (words) => {
  lower();
  const narrower = searched && words.startsWith(searched); // only items that matched before can match now
  for (const { lowered, matches } of [data, ...sets, ...runs])
    for (let i = 0; i < lowered.length; i++)
      matches[i] = (!narrower || matches[i]) && lowered[i].includes(words) ? 1 : 0;
  searched = words;
};

const numbers = new Int32Array(answers);
const find = (wanted, words) => {
  if (words) search(words);
  const bit = BITS[wanted.agreement] ?? 0;
  const verdict = { right: 1, wrong: 0 }[wanted.verdict] ?? -1;
  let length = 0;
  for (const set of sets) {
    if (wanted.dataset && set.dataset !== wanted.dataset) continue;
    const chosen = set.runs.flatMap((run, column) =>
      ["method", "size", "fraction", "seed"].every((name) => !wanted[name] || run[name] === wanted[name])
        ? [[run, column]] : []);
    for (let row = 0; row < set.ids.length; row++) {
      const whole = !words || set.matches[row] || data.matches[set.gold[row]];
      for (const [run, column] of chosen) {
        if (verdict >= 0 && run.correct[row] !== verdict) continue;
        if (bit && !(run.bits[row] & bit)) continue;
        if (!whole && !data.matches[run.predictions[row]] && !run.matches[row]) continue;
        numbers[length++] = set.first + row * set.runs.length + column;
      }
    }
  }
  return numbers.subarray(0, length);
};

const several = (name) => new Set(runs.map((run) => run[name])).size > 1;
const named = { dataset: sets.length > 1, size: several("size"), fraction: several("fraction"), seed: several("seed") };
const nameOf = (set, run, own = true) =>
  [named.dataset && own && visible(set.dataset), visible(run.method), named.size && run.size,
    named.fraction && run.fraction, named.seed && `seed ${run.seed}`].filter(Boolean).join(", ");
const verdictOf = (run, row) => (run.correct[row] ? "right" : "wrong");

const line = (number) => {
  const { set, row, run } = place(number);
  const note = run.correct[row] ? "" : ` (label ${texts[set.gold[row]]})`;
  const input = set.inputs[row].slice(0, 200) || set.ids[row];
  return { verdict: verdictOf(run, row), name: texts[run.predictions[row]], note, below: `${nameOf(set, run)}: ${input}` };
};

const explain = (number) => {
  const { set, row, run } = place(number);
  const verdict = verdictOf(run, row);
  const consistent = { 0: "no", 1: "yes" }[run.consistent[row]];
  const others = set.runs.map((other) => {
    const name = element("th", "", nameOf(set, other, false));
    name.scope = "row";
    const answer = visible(texts[other.predictions[row]]) || "(nothing)";
    const made = element("tr", "", name, element("td", "", mark(verdictOf(other, row)), answer));
    if (other === run) made.setAttribute("aria-current", "true");
    return made;
  });
  const caption = element("caption", "", `All ${others.length} answers to this input`);
  return [
    element("h3", "", element("span", `is-${verdict}`, `${SIGNS[verdict]} ${verdict}`), `: ${nameOf(set, run)}`),
    facts([
      ["input", said(set.inputs[row])],
      ["label", said(texts[set.gold[row]])],
      ["prediction", said(texts[run.predictions[row]])],
      ["rationale", run.said[row] && said(run.said[row])],
      ["label that the rationale argues for", run.implied[row] >= 0 && said(texts[run.implied[row]])],
      ["rationale and prediction agree", consistent],
      ["teacher's rationale", set.teacher[row] && said(set.teacher[row])],
      ["id", said(set.ids[row])],
    ]),
    ...(others.length > 1 ? [element("table", "", caption, element("tbody", "", ...others))] : []),
  ];
};

browse({ noun: "answer", total: answers, find, line, explain });
at("text").addEventListener("focus", () => setTimeout(lower), { once: true });
