// The browser of predictions. Texts come from data and from students: they become text nodes, never markup.
"use strict";
(() => {
  const at = (id) => document.getElementById(id);
  const list = at("list");
  if (!list) return; // a page without answers
  const space = at("space");
  const detail = at("detail");
  const data = JSON.parse(at("data").textContent);
  const { texts, sets, runs } = data;
  const OVERSCAN = 6; // rows beyond either edge that are drawn, too
  const FILTERS = ["dataset", "method", "size", "fraction", "seed", "verdict", "agreement"].filter((name) => at(name));
  // What is known of an answer beside right or wrong, as bits.
  const [DISAGREE, ONLY_RIGHT, ONLY_WRONG, ALL_WRONG] = [1, 2, 4, 8];
  const BITS = { "disagree": DISAGREE, "only-right": ONLY_RIGHT, "only-wrong": ONLY_WRONG, "all-wrong": ALL_WRONG };

  // The same characters as _UNSEEN of elements.py.
  const unseen = /[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u2028-\u202e\u2066-\u2069\ufeff\ufffe\uffff]|\p{Surrogate}/gu;
  const visible = (text) =>
    text.replace(unseen, (c) => `⟨U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
  const count = (number) => number.toLocaleString("en");

  const element = (tag, kind, ...children) => {
    const made = document.createElement(tag);
    if (kind) made.className = kind;
    made.append(...children);
    return made;
  };

  // ---- Answers are numbered by set, then test row, then run, so that all answers to an input stand together.
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
    let set = sets[0];
    for (const other of sets) if (other.first <= number && other.ids.length && other.runs.length) set = other;
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

  // ---- Search. What is searched is put into lower case once, at the first use.
  let lowered = false;
  const lower = () => {
    if (lowered) return;
    lowered = true;
    data.lowered = texts.map((text) => text.toLowerCase());
    for (const set of sets) {
      set.lowered = set.ids.map((id, row) => `${id}\n${set.inputs[row]}`.toLowerCase());
      set.matches = new Uint8Array(set.ids.length);
    }
    for (const run of runs) run.lowered = run.said.map((text) => text?.toLowerCase() ?? "");
  };
  let searched = "";
  let textMatches = new Uint8Array(texts.length);
  const search = (words) => {
    lower();
    const narrower = searched && words.startsWith(searched); // only what matched before can match now
    for (let i = 0; i < texts.length; i++)
      textMatches[i] = (!narrower || textMatches[i]) && data.lowered[i].includes(words) ? 1 : 0;
    for (const set of sets)
      for (let row = 0; row < set.ids.length; row++)
        set.matches[row] = (!narrower || set.matches[row]) && set.lowered[row].includes(words) ? 1 : 0;
    for (const run of runs) {
      run.matches ??= new Uint8Array(run.said.length);
      for (let row = 0; row < run.said.length; row++)
        run.matches[row] = (!narrower || run.matches[row]) && run.lowered[row].includes(words) ? 1 : 0;
    }
    searched = words;
  };

  let found = new Int32Array(answers); // numbers of the answers that the filters leave; `length` of them
  let length = 0;
  const filter = () => {
    const wanted = Object.fromEntries(FILTERS.map((name) => [name, at(name).value]));
    const words = at("text").value.trim().toLowerCase();
    if (words) search(words);
    const bit = BITS[wanted.agreement] ?? 0;
    const verdict = { right: 1, wrong: 0 }[wanted.verdict] ?? -1;
    length = 0;
    for (const set of sets) {
      if (wanted.dataset && set.dataset !== wanted.dataset) continue;
      const chosen = set.runs.flatMap((run, column) =>
        ["method", "size", "fraction", "seed"].every((name) => !wanted[name] || run[name] === wanted[name])
          ? [[run, column]] : []);
      const width = set.runs.length;
      for (let row = 0; row < set.ids.length; row++) {
        const whole = !words || set.matches[row] || textMatches[set.gold[row]];
        for (const [run, column] of chosen) {
          if (verdict >= 0 && run.correct[row] !== verdict) continue;
          if (bit && !(run.bits[row] & bit)) continue;
          if (!whole && !textMatches[run.predictions[row]] && !run.matches[row]) continue;
          found[length++] = set.first + row * width + column;
        }
      }
    }
    const some = length < answers ? `${count(length)} of ${count(answers)} answers` : `${count(answers)} answers`;
    at("told").textContent = length ? some : "No answer has what these filters ask for";
    active = 0;
    list.scrollTop = 0;
    redraw();
    explain();
  };

  // ---- The list draws what can be seen.
  let active = 0; // place in `found`
  let height = 62;
  let drawn = new Map(); // place in `found` to element
  const layOut = () => {
    height = parseFloat(getComputedStyle(list).getPropertyValue("--row"));
    redraw();
  };
  const redraw = () => {
    for (const node of drawn.values()) node.remove();
    drawn = new Map();
    space.style.height = `${length * height}px`;
    draw();
  };
  const draw = () => {
    const first = Math.max(0, Math.floor(list.scrollTop / height) - OVERSCAN);
    const last = Math.min(length, Math.ceil((list.scrollTop + list.clientHeight) / height) + OVERSCAN);
    for (const [number, node] of drawn) {
      if ((number < first || number >= last) && number !== active) {
        node.remove();
        drawn.delete(number);
      }
    }
    for (let number = first; number < last; number++) if (!drawn.has(number)) add(number);
    if (length && !drawn.has(active)) add(active); // the one that a screen reader is told of has to be there
    if (length) list.setAttribute("aria-activedescendant", `answer-${active}`);
    else list.removeAttribute("aria-activedescendant");
  };
  const add = (number) => {
    const { set, row, run } = place(found[number]);
    const right = run.correct[row] === 1;
    const mark = element("span", `mark is-${right ? "right" : "wrong"}`, right ? "✓" : "✗");
    mark.setAttribute("aria-label", right ? "right: " : "wrong: ");
    mark.setAttribute("role", "img");
    const gold = right ? "" : ` (label ${visible(texts[set.gold[row]])})`;
    const answer = element("div", "", mark, element("b", "", visible(texts[run.predictions[row]]) || "(nothing)"), gold);
    const line = visible(set.inputs[row].slice(0, 200)) || visible(set.ids[row]);
    const node = element("div", "answer", answer, element("div", "run", `${told(set, run)}: ${line}`));
    node.id = `answer-${number}`;
    node.setAttribute("role", "option");
    node.setAttribute("aria-selected", String(number === active));
    node.setAttribute("aria-setsize", String(length));
    node.setAttribute("aria-posinset", String(number + 1));
    node.style.transform = `translateY(${number * height}px)`;
    drawn.set(number, node);
    space.append(node);
  };
  const several = (name) => new Set(runs.map((run) => run[name])).size > 1;
  const named = { dataset: sets.length > 1, size: several("size"), fraction: several("fraction"), seed: several("seed") };
  const told = (set, run, own = true) =>
    [named.dataset && own && visible(set.dataset), visible(run.method), named.size && run.size,
      named.fraction && run.fraction, named.seed && `seed ${run.seed}`].filter(Boolean).join(", ");

  const choose = (number) => {
    drawn.get(active)?.setAttribute("aria-selected", "false");
    active = Math.max(0, Math.min(length - 1, number));
    const top = active * height;
    if (top < list.scrollTop) list.scrollTop = top;
    else if (top + height > list.scrollTop + list.clientHeight) list.scrollTop = top + height - list.clientHeight;
    draw();
    drawn.get(active)?.setAttribute("aria-selected", "true");
    explain();
  };

  // ---- The chosen answer in full, beside what the other runs answered.
  const said = (text) => {
    const block = element("div", "said", text ? visible(text) : element("span", "none", "(nothing)"));
    block.dir = "auto";
    return block;
  };
  const explain = () => {
    detail.scrollTop = 0;
    if (!length) {
      detail.replaceChildren(element("p", "none", "Nothing chosen."));
      return;
    }
    const { set, row, run } = place(found[active]);
    const right = run.correct[row] === 1;
    const verdict = element("span", right ? "is-right" : "is-wrong", right ? "✓ right" : "✗ wrong");
    const facts = element("dl", "");
    const fact = (name, value) => facts.append(element("dt", "", name), element("dd", "", value));
    fact("input", said(set.inputs[row]));
    fact("label", said(texts[set.gold[row]]));
    fact("prediction", said(texts[run.predictions[row]]));
    if (run.said[row]) fact("rationale", said(run.said[row]));
    if (run.implied[row] >= 0) fact("label that the rationale argues for", said(texts[run.implied[row]]));
    const consistent = { 0: "no", 1: "yes" }[run.consistent[row]];
    if (consistent) fact("rationale and prediction agree", consistent);
    if (set.teacher[row]) fact("teacher's rationale", said(set.teacher[row]));
    fact("id", said(set.ids[row]));
    const others = element("tbody", "");
    for (const other of set.runs) {
      const good = other.correct[row] === 1;
      const mark = element("span", `mark is-${good ? "right" : "wrong"}`, good ? "✓" : "✗");
      mark.setAttribute("role", "img");
      mark.setAttribute("aria-label", good ? "right" : "wrong");
      const name = element("th", "", told(set, other, false));
      name.scope = "row";
      const line = element("tr", "", name, element("td", "", mark, visible(texts[other.predictions[row]]) || "(nothing)"));
      if (other === run) line.setAttribute("aria-current", "true");
      others.append(line);
    }
    const parts = [element("h3", "", verdict, `: ${told(set, run)}`), facts];
    if (set.runs.length > 1) {
      const caption = element("caption", "", `All ${set.runs.length} answers to this input`);
      parts.push(element("table", "", caption, others));
    }
    detail.replaceChildren(...parts);
  };

  // ---- Events
  let waiting = false;
  list.addEventListener("scroll", () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      draw();
    });
  }, { passive: true });
  list.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const screen = Math.max(1, Math.floor(list.clientHeight / height) - 1);
    const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: screen, PageUp: -screen, Home: -length, End: length };
    if (event.key in steps) choose(active + steps[event.key]);
    else if (event.key === "Enter") detail.focus();
    else return;
    event.preventDefault();
  });
  detail.addEventListener("keydown", (event) => {
    if (event.key === "Escape") list.focus();
  });
  list.addEventListener("click", (event) => {
    const node = event.target.closest(".answer");
    if (node) choose(Number(node.id.slice("answer-".length)));
  });
  at("filters").addEventListener("input", filter);
  at("filters").addEventListener("submit", (event) => event.preventDefault());
  at("filters").addEventListener("reset", (event) => {
    event.preventDefault(); // the browser's own would come after this
    for (const name of [...FILTERS, "text"]) at(name).value = "";
    filter();
  });
  at("text").addEventListener("focus", () => setTimeout(lower), { once: true });
  addEventListener("resize", layOut);
  filter();
  layOut();
})();
