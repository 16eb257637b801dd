// The browser of examples. Texts come from people and from a teacher: they become text nodes, never markup.
"use strict";
(() => {
  const PER_PAGE = 50;
  const LONG = 1500; // characters, above which a text is shown in part at first
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  if (!at("list")) return; // a page without rows
  const form = at("filters");
  const filters = ["verdict", "outcome", "hinted", "label", "teacher"].filter((name) => at(name));
  let found = [];
  let first = 0;

  // The same characters as _UNSEEN of report/elements.py.
  const unseen = /[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u2028-\u202e\u2066-\u2069\ufeff\ufffe\uffff]|\p{Surrogate}/gu;
  const visible = (text) =>
    text.replace(unseen, (c) => `⟨U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);

  const element = (tag, kind, ...children) => {
    const made = document.createElement(tag);
    if (kind) made.className = kind;
    made.append(...children);
    return made;
  };

  // A text of the data as an element: isolated in its writing direction, long ones in part.
  const said = (text, kind = "") => {
    const block = element("div", `said ${kind}`);
    block.dir = "auto";
    if (text === undefined || text === "") {
      block.append(element("span", "none", "(nothing)"));
      return block;
    }
    if (text.length <= LONG) {
      block.append(visible(text));
      return block;
    }
    // Not between the two halves of one character.
    const end = LONG - 300 - (/[\ud800-\udbff]/.test(text[LONG - 301]) ? 1 : 0);
    block.append(visible(text.slice(0, end)), "…");
    const more = element("button", "more", `Show all ${text.length.toLocaleString("en")} characters`);
    more.type = "button";
    more.onclick = () => {
      block.replaceChildren(visible(text));
      block.tabIndex = -1;
      block.focus();
      more.remove();
    };
    return element("div", "", block, more);
  };

  const pair = (name, value) => element("div", "", element("dt", "", name), element("dd", "", value));

  const prompt = (row) => {
    const parts = [];
    for (let i = 0; i < row.prompt?.length; i += 2) parts.push(...data.lines.slice(row.prompt[i], row.prompt[i + 1]));
    return parts.join("");
  };

  const replies = (row) => {
    const texts = row.replies ?? [];
    if (texts.length <= 1) return said(texts[0], "raw");
    const list = element("ol", "");
    texts.forEach((text, i) => {
      list.append(element("li", "", element("span", "aside", `reply ${i + 1}`), said(text, "raw")));
    });
    const rest = row.left_out ? element("p", "aside", `and ${row.left_out} more that are not on this page`) : "";
    return element("div", "", list, rest);
  };

  const NAMES = { right: "right", wrong: "wrong", unusable: "unusable", unjudged: "not judged" };
  const example = (row) => {
    const verdict = NAMES[row.verdict] + (row.hinted ? ", after a hint" : "");
    const head = element(
      "h3", "",
      element("span", `verdict is-${row.verdict}`, verdict),
      element("span", "chip", visible(row.outcome ?? "")),
      element("bdi", "id", visible(row.id ?? "")),
    );
    const labels = element("div", "labels", pair("human label", said(row.label)), pair("teacher's label", said(row.teacher_label)));
    if (row.votes) labels.append(pair("votes", `${row.votes[0]} of ${row.votes[1]}`));
    const left = element("dl", "", pair("input", said(row.input)), labels, pair("rationale", said(row.rationale)));
    const name = (row.replies?.length ?? 0) > 1 ? "raw replies" : "raw reply";
    const right = element("dl", "", pair(name, replies(row)));
    const whole = element("details", "", element("summary", "", "Prompt"));
    whole.addEventListener("toggle", () => {
      if (whole.childElementCount > 1) return;
      const text = element("div", "said raw", visible(prompt(row)) || "(nothing)");
      text.dir = "auto";
      text.tabIndex = 0; // it scrolls
      whole.append(text);
    });
    return element("li", "", element("article", "", head, element("div", "example", element("div", "", left), element("div", "", right), whole)));
  };

  const teacher = (row) => {
    if (row.teacher_label === undefined) return "none";
    const number = data.labels.indexOf(row.teacher_label);
    return number < 0 ? "other" : String(number);
  };
  const TESTS = {
    verdict: (row, value) => row.verdict === value,
    outcome: (row, value) => (row.outcome ?? "") === outcomes[value],
    hinted: (row, value) => Boolean(row.hinted) === (value === "yes"),
    label: (row, value) => row.label === data.labels[value],
    teacher: (row, value) => teacher(row) === value,
  };
  const searched = (row) =>
    (row.searched ??= [row.id, row.input, row.label, row.teacher_label, row.rationale, ...(row.replies ?? [])]
      .filter((text) => text !== undefined).join("\n").toLowerCase());

  const show = () => {
    const page = found.slice(first, first + PER_PAGE);
    const list = at("list");
    list.start = first + 1;
    list.replaceChildren(...page.map(example));
    const [from, to, of] = [first + 1, first + page.length, found.length].map((n) => n.toLocaleString("en"));
    const which = `${found.length === 1 ? "example" : "examples"}${found.length < data.rows.length ? " with these filters" : ""}`;
    at("told").textContent = page.length ? `${from} to ${to} of ${of} ${which}` : "No example has what these filters ask for";
    for (const button of document.querySelectorAll("[data-page]")) {
      const start = first + PER_PAGE * Number(button.dataset.page);
      button.setAttribute("aria-disabled", String(start < 0 || start >= found.length));
    }
    at("paging-below").hidden = found.length <= PER_PAGE;
  };

  const filter = () => {
    const wanted = filters.filter((name) => at(name).value !== "").map((name) => [TESTS[name], at(name).value]);
    const text = at("text").value.trim().toLowerCase();
    found = data.rows.filter(
      (row) => wanted.every(([test, value]) => test(row, value)) && (!text || searched(row).includes(text)));
    first = 0;
    show();
  };

  const clear = () => {
    for (const name of [...filters, "text"]) at(name).value = "";
  };

  // Focus, too, goes to the top of what is new.
  const go = (top) => {
    at("told").focus({ preventScroll: true });
    top.scrollIntoView({ block: "start" });
  };

  const counts = new Map();
  for (const row of data.rows) counts.set(row.outcome ?? "", (counts.get(row.outcome ?? "") ?? 0) + 1);
  const outcomes = [...counts.keys()].sort((a, b) => counts.get(b) - counts.get(a) || (a < b ? -1 : 1));
  outcomes.forEach((outcome, i) =>
    at("outcome").append(new Option(`${visible(outcome)} (${counts.get(outcome).toLocaleString("en")})`, String(i))));

  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", (event) => {
    event.preventDefault(); // the browser's own would come after this
    clear();
    filter();
  });
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    const { page, verdict, label, teacher: by } = button.dataset;
    if (page !== undefined) {
      if (button.getAttribute("aria-disabled") === "true") return;
      first += PER_PAGE * Number(page);
      show();
      go(at("told"));
    } else if (verdict !== undefined || label !== undefined) {
      clear();
      if (verdict !== undefined) at("verdict").value = verdict;
      if (label !== undefined) [at("label").value, at("teacher").value] = [label, by];
      filter();
      go(form);
    }
  });
  filter();
})();
