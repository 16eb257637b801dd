// The examples of a teacher's page, for browse(). Rows omit empty fields; teacher/page.py describes the data.
const data = JSON.parse(at("data").textContent);
const VERDICTS = { right: "right", wrong: "wrong", unusable: "unusable", unjudged: "not judged" };

const prompt = (row) => {
  const parts = [];
  for (let i = 0; i < row.prompt?.length; i += 2) parts.push(...data.lines.slice(row.prompt[i], row.prompt[i + 1]));
  return parts.join("");
};
const teacher = (row) => {
  if (row.teacher_label === undefined) return "none";
  const number = data.labels.indexOf(row.teacher_label);
  return number < 0 ? "other" : String(number);
};
const TESTS = {
  verdict: (row, value) => row.verdict === value,
  outcome: (row, value) => (row.outcome ?? "") === data.outcomes[value],
  hinted: (row, value) => Boolean(row.hinted) === (value === "yes"),
  label: (row, value) => row.label === data.labels[value],
  teacher: (row, value) => teacher(row) === value,
};
const searched = (row) =>
  (row.searched ??= [row.id, row.input, row.label, row.teacher_label, row.rationale, ...(row.replies ?? [])]
    .filter((text) => text !== undefined).join("\n").toLowerCase());

const find = (wanted, words) => {
  const tests = Object.entries(wanted).filter(([, value]) => value !== "");
  return [...data.rows.keys()].filter((number) => {
    const row = data.rows[number];
    return tests.every(([name, value]) => TESTS[name](row, value)) && (!words || searched(row).includes(words));
  });
};

const line = (number) => {
  const row = data.rows[number];
  const human = row.verdict !== "right" && row.label !== undefined ? ` (human label ${row.label})` : "";
  const hint = row.hinted ? ", after a hint" : "";
  const input = (row.input ?? "").slice(0, 200) || row.id || "";
  return { verdict: row.verdict, name: row.teacher_label ?? "no label", note: `${human}${hint}`, below: `${row.outcome ?? ""}: ${input}` };
};

const replies = (row) => {
  const texts = row.replies ?? [];
  if (texts.length <= 1) return said(texts[0], "raw");
  const list = texts.map((text, i) => element("li", "", element("span", "aside", `reply ${i + 1}`), said(text, "raw")));
  const rest = row.left_out ? element("p", "aside", `and ${row.left_out} more that are not on this page`) : "";
  return element("div", "", element("ol", "", ...list), rest);
};

const explain = (number) => {
  const row = data.rows[number];
  const verdict = `${SIGNS[row.verdict] ?? "–"} ${VERDICTS[row.verdict]}${row.hinted ? ", after a hint" : ""}`;
  const whole = element("details", "", element("summary", "", "Prompt"));
  whole.addEventListener("toggle", () => {
    if (whole.childElementCount === 1) whole.append(said(prompt(row), "raw"));
  });
  return [
    element("h3", "", element("span", `is-${row.verdict}`, verdict), " ", element("span", "chip", visible(row.outcome ?? ""))),
    facts([
      ["input", said(row.input)],
      ["human label", said(row.label)],
      ["teacher's label", said(row.teacher_label)],
      ["votes", row.votes && `${row.votes[0]} of ${row.votes[1]}`],
      ["rationale", said(row.rationale)],
      [(row.replies?.length ?? 0) > 1 ? "raw replies" : "raw reply", replies(row)],
      ["id", said(row.id, "id")],
    ]),
    whole,
  ];
};

if (at("list")) { // a page without rows has no list
  const set = browse({ noun: "example", total: data.rows.length, find, line, explain });
  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-verdict], [data-label]");
    if (!button) return;
    set({ ...button.dataset });
    at("filters").scrollIntoView({ block: "start" });
    at("list").focus({ preventScroll: true });
  });
}
