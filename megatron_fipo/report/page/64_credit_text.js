/* The response as running text, a span for each token, in blocks of some 250 tokens.

   The browser lays out only the blocks in view (content-visibility), and only these are coloured; a change of the
   half-life changes the classes of those tokens alone whose colour changes. A block starts on a line of its own, with
   the number of its first token beside it, after a newline where there is one nearby. */

const BLOCK_TOKENS = { least: 200, usual: 250, most: 300 };
const LINE_HEIGHT_PX = 28;
const CHARACTER_WIDTH_PX = 7.4;
const MARKS = { " ": "·", "\n": "↵", "\t": "⇥" };

function blockEnd(texts, start) {
  if (texts.length - start <= BLOCK_TOKENS.most) return texts.length;
  for (let end = start + BLOCK_TOKENS.most; end > start + BLOCK_TOKENS.least; end -= 1) {
    if (texts[end - 1].endsWith("\n")) return end;
  }
  return start + BLOCK_TOKENS.usual;
}

/** Signs for the white space that a token begins with or consists of; a token without text has a sign of its own. */
function markOf(text) {
  if (text === "") return "∅";
  const space = text.match(/^[ \n\t]+/);
  return space ? Array.from(space[0], (character) => MARKS[character]).join("") : null;
}

class TokenText {
  /** `chosen(index)`: a token was pressed or reached by keys; `pointed(index or null)`: it is under the pointer. */
  constructor({ chosen, pointed, scrolled }) {
    this.chosen = chosen;
    this.spans = [];
    this.blocks = [];
    this.current = -1;
    this.box = element("div", { class: "response", tabindex: "0", role: "group", "aria-roledescription": "response" });
    this.box.setAttribute(
      "aria-label",
      "Response. Arrow keys go from token to token; Home and End to the first and last.",
    );
    this.box.addEventListener(
      "click",
      (event) => event.target.matches(".token") && this.choose(event.target.tokenIndex),
    );
    this.box.addEventListener("pointerover", (event) =>
      pointed(event.target.matches(".token") ? event.target.tokenIndex : null),
    );
    this.box.addEventListener("pointerleave", () => pointed(null));
    this.box.addEventListener("keydown", (event) => this.onKey(event));
    this.box.addEventListener("scroll", scrolled, { passive: true });
    this.watch = new IntersectionObserver((entries) => this.onSeen(entries), { root: this.box, rootMargin: "400px" });
  }

  show(view) {
    this.watch.disconnect();
    this.spans = [];
    this.blocks = [];
    this.current = -1;
    this.levels = new Int8Array(view.numTokens);
    this.painted = new Int8Array(view.numTokens);
    this.base = new Array(view.numTokens);
    const charactersInLine = Math.max(20, (this.box.clientWidth - 60) / CHARACTER_WIDTH_PX);
    for (let start = 0; start < view.numTokens; start = this.blocks.at(-1).end)
      this.addBlock(view, start, charactersInLine);
    this.box.replaceChildren(...this.blocks.map(({ node }) => node));
    this.box.scrollTop = 0;
    this.blocks.forEach(({ node }) => this.watch.observe(node));
  }

  addBlock(view, start, charactersInLine) {
    const end = blockEnd(view.texts, start);
    const node = element("div", { class: "block", "data-start": start });
    let lines = 1;
    let characters = 0;
    for (let index = start; index < end; index += 1) {
      const text = view.texts[index];
      const span = document.createElement("span");
      this.base[index] = view.leftOut[index] ? "token left-out" : "token";
      span.className = this.base[index];
      span.tokenIndex = index;
      span.textContent = visibleText(text);
      const mark = markOf(text);
      if (mark) span.dataset.mark = mark;
      lines += text.split("\n").length - 1;
      characters += text.length;
      this.spans.push(span);
      node.append(span);
    }
    const height = Math.round((lines + characters / charactersInLine) * LINE_HEIGHT_PX);
    node.style.containIntrinsicBlockSize = `auto ${height}px`;
    node.blockIndex = this.blocks.length;
    this.blocks.push({ node, start, end, isSeen: false });
  }

  onSeen(entries) {
    for (const entry of entries) {
      const block = this.blocks[entry.target.blockIndex];
      if (!block || block.node !== entry.target) continue;
      block.isSeen = entry.isIntersecting;
      if (block.isSeen) this.paintBlock(block);
    }
  }

  paint(levels) {
    this.levels = levels;
    for (const block of this.blocks) if (block.isSeen) this.paintBlock(block);
  }

  /** For printing, where all blocks are seen. */
  paintAll() {
    for (const block of this.blocks) this.paintBlock(block);
  }

  paintBlock({ start, end }) {
    for (let index = start; index < end; index += 1) {
      const level = this.levels[index];
      if (this.painted[index] === level) continue;
      this.painted[index] = level;
      this.spans[index].className = this.base[index] + levelClass(level);
    }
  }

  onKey(event) {
    const last = this.spans.length - 1;
    const moves = { ArrowLeft: this.current - 1, ArrowRight: this.current + 1, Home: 0, End: last };
    if (event.ctrlKey || event.metaKey || event.altKey || !(event.key in moves) || last < 0) return;
    event.preventDefault();
    const step = event.shiftKey && event.key.startsWith("Arrow") ? 9 * (event.key === "ArrowLeft" ? -1 : 1) : 0;
    this.choose(within(moves[event.key] + step, 0, last), true);
  }

  choose(index, bringIntoView = false) {
    this.spans[this.current]?.removeAttribute("data-current");
    this.current = index;
    const span = this.spans[index];
    if (!span) return;
    span.setAttribute("data-current", "");
    if (bringIntoView) this.bringIntoView(index);
    this.chosen(index);
  }

  /** Scrolls the box alone, not the page. A block that was never laid out gets its true height first. */
  bringIntoView(index) {
    const block = this.blocks.findLast(({ start }) => start <= index);
    const box = this.box.getBoundingClientRect();
    for (const target of [block.node, this.spans[index]]) {
      const place = target.getBoundingClientRect();
      const isAbove = place.top < box.top + LINE_HEIGHT_PX;
      const isBelow = place.bottom > box.bottom - LINE_HEIGHT_PX;
      if (isAbove || isBelow) this.box.scrollTop += place.top - box.top - box.height / 2;
    }
  }

  /** [first, last] index of the tokens in view, by blocks and their share in view. */
  inView() {
    const box = this.box.getBoundingClientRect();
    const seen = this.blocks
      .filter(({ isSeen }) => isSeen)
      .map((block) => ({ ...block, place: block.node.getBoundingClientRect() }));
    const inside = seen.filter(({ place }) => place.bottom > box.top && place.top < box.bottom);
    if (!inside.length) return [0, 0];
    const along = ({ start, end, place }, edge) =>
      start + ((end - start) * within(edge - place.top, 0, place.height)) / (place.height || 1);
    return [along(inside[0], box.top), along(inside.at(-1), box.bottom)];
  }
}
