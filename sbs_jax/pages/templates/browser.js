"use strict";
// The browser of a page: filters, a list that draws only its visible rows, and the chosen item in full.
// Texts come from data, people and models: they become text nodes, never markup.
const OVERSCAN = 6; // rows beyond either edge that are drawn as well
const at = (id) => document.getElementById(id);
const count = (number) => number.toLocaleString("en");

// The same characters as _UNSEEN of rendering.py.
const unseen = /[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u2028-\u202e\u2066-\u2069\ufeff\ufffe\uffff]|\p{Surrogate}/gu;
const visible = (text) =>
  text.replace(unseen, (c) => `⟨U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);

const element = (tag, kind, ...children) => {
  const made = document.createElement(tag);
  if (kind) made.className = kind;
  made.append(...children);
  return made;
};

// A text of the data as a block with its own writing direction.
const said = (text, kind = "") => {
  const block = element("div", `said ${kind}`, text ? visible(text) : element("span", "none", "(nothing)"));
  block.dir = "auto";
  return block;
};

// [name, node] pairs as a list; a pair without a node is left out.
const facts = (pairs) => {
  const list = element("dl", "");
  for (const [name, node] of pairs) if (node) list.append(element("dt", "", name), element("dd", "", node));
  return list;
};

const SIGNS = { right: "✓", wrong: "✗" };
const mark = (verdict) => {
  const sign = element("span", `mark is-${verdict}`, SIGNS[verdict] ?? "–");
  sign.setAttribute("role", "img");
  sign.setAttribute("aria-label", `${verdict}: `);
  return sign;
};

// Runs the browser of `total` items; `find(wanted, words)` returns the numbers of the items that pass the filters (the
// values of the selects and the lower-case text); `line(number)` is { verdict, name, note, below } of a row in the list,
// `explain(number)` the nodes of an item in full. Returns a function that sets filters: set({ verdict: "wrong" }).
function browse({ noun, total, find, line, explain }) {
  const [list, space, detail, form] = ["list", "space", "detail", "filters"].map(at);
  const selects = [...form.querySelectorAll("select")];
  let found = []; // numbers of the items that pass the filters
  let active = 0; // place in `found`
  let height = 62;
  let drawn = new Map(); // place in `found` to element

  const filter = () => {
    const words = at("text").value.trim().toLowerCase();
    found = find(Object.fromEntries(selects.map((select) => [select.id, select.value])), words);
    const some = found.length < total ? `${count(found.length)} of ` : "";
    const none = `No ${noun} has what these filters ask for`;
    at("told").textContent = found.length ? `${some}${count(total)} ${noun}${total === 1 ? "" : "s"}` : none;
    list.scrollTop = 0;
    active = 0;
    redraw();
    show();
  };
  const redraw = () => {
    height = parseFloat(getComputedStyle(list).getPropertyValue("--row"));
    for (const node of drawn.values()) node.remove();
    drawn = new Map();
    space.style.height = `${found.length * height}px`;
    draw();
  };
  const draw = () => {
    const first = Math.max(0, Math.floor(list.scrollTop / height) - OVERSCAN);
    const last = Math.min(found.length, Math.ceil((list.scrollTop + list.clientHeight) / height) + OVERSCAN);
    for (const [place, node] of drawn) {
      if ((place < first || place >= last) && place !== active) {
        node.remove();
        drawn.delete(place);
      }
    }
    for (let place = first; place < last; place++) if (!drawn.has(place)) add(place);
    if (found.length && !drawn.has(active)) add(active); // aria-activedescendant needs an element
    if (found.length) list.setAttribute("aria-activedescendant", `item-${active}`);
    else list.removeAttribute("aria-activedescendant");
  };
  const add = (place) => {
    const { verdict, name, note, below } = line(found[place]);
    const above = element("div", "", mark(verdict), element("b", "", visible(name) || "(nothing)"), visible(note));
    const node = element("div", "item", above, element("div", "below", visible(below)));
    const attributes = { role: "option", "aria-selected": place === active, "aria-setsize": found.length, "aria-posinset": place + 1 };
    for (const [attribute, value] of Object.entries(attributes)) node.setAttribute(attribute, value);
    node.id = `item-${place}`;
    node.style.transform = `translateY(${place * height}px)`;
    drawn.set(place, node);
    space.append(node);
  };
  const choose = (place) => {
    drawn.get(active)?.setAttribute("aria-selected", "false");
    active = Math.max(0, Math.min(found.length - 1, place));
    const top = active * height;
    if (top < list.scrollTop) list.scrollTop = top;
    else if (top + height > list.scrollTop + list.clientHeight) list.scrollTop = top + height - list.clientHeight;
    draw();
    drawn.get(active)?.setAttribute("aria-selected", "true");
    show();
  };
  const show = () => {
    detail.scrollTop = 0;
    detail.replaceChildren(...(found.length ? explain(found[active]) : [element("p", "none", "Nothing chosen.")]));
  };
  const set = (values) => {
    for (const { id } of [...selects, at("text")]) at(id).value = values[id] ?? "";
    filter();
  };

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
    const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: screen, PageUp: -screen, Home: -found.length, End: found.length };
    if (event.key in steps) choose(active + steps[event.key]);
    else if (event.key === "Enter") detail.focus();
    else return;
    event.preventDefault();
  });
  detail.addEventListener("keydown", (event) => {
    if (event.key === "Escape") list.focus();
  });
  list.addEventListener("click", (event) => {
    const node = event.target.closest(".item");
    if (node) choose(Number(node.id.slice("item-".length)));
  });
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", (event) => {
    event.preventDefault(); // the browser's own reset would come after this
    set({});
  });
  addEventListener("resize", redraw);
  filter();
  return set;
}
