// Looks at the laid-out pages in this page's frames, and writes what is wrong with each into #found, as JSON.
function check(frame) {
  const view = frame.contentWindow, page = frame.contentDocument, faults = [];
  const width = page.documentElement.clientWidth;
  const name = (node) => `"${node.textContent.trim().slice(0, 40)}"`;

  if (page.documentElement.scrollWidth > width) faults.push(`wider than the page: ${page.documentElement.scrollWidth}`);

  // Every piece of text: its size on the screen, its colour, and whether its box holds it.
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const light = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const linear = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map((x) => x / 255)
                       .map((x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];  // WCAG 2, relative luminance
  };
  const ground = light(view.getComputedStyle(page.body).backgroundColor);
  const walker = page.createTreeWalker(page.body, NodeFilter.SHOW_TEXT);
  let texts = 0;
  while (walker.nextNode()) {
    const node = walker.currentNode, element = node.parentElement;
    if (!node.textContent.trim() || ["title", "STYLE"].includes(element.tagName)) continue;
    texts++;
    const style = view.getComputedStyle(element), svg = element.closest("svg");
    const scale = svg ? Math.hypot(element.getScreenCTM().a, element.getScreenCTM().b) : 1;
    const size = parseFloat(style.fontSize) * scale;
    if (size < 11) faults.push(`below 11 pixels: ${name(node)} ${size.toFixed(1)}`);
    const ink = light(svg ? style.fill : style.color);
    const contrast = (Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05);
    if (contrast < 4.5 && !element.closest(".k, .v")) faults.push(`contrast of ${name(node)}: ${contrast.toFixed(1)}`);
    const free = svg || element.closest(".scroll") || style.display === "inline";
    if (!free && element.scrollWidth > element.clientWidth + 1)
      faults.push(`over its box: ${name(node)}`);
  }

  // Cells of strips and tables are as wide as what they hold, and no two boxes of text lie on each other.
  const boxes = [];
  const walk = page.createTreeWalker(page.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const node = walk.currentNode, element = node.parentElement;
    if (!node.textContent.trim() || ["title", "STYLE"].includes(element.tagName)) continue;
    const range = page.createRange();
    range.selectNodeContents(node);
    const svg = element.closest("svg.chart, svg:not([aria-hidden])");
    const rects = svg ? [element.getBoundingClientRect()] : [...range.getClientRects()];
    for (const rect of rects) boxes.push({rect, svg, node});
    if (svg) {
      const frame = svg.getBoundingClientRect(), rect = rects[0];
      const across = rect.left >= frame.left - 1 && rect.right <= frame.right + 1;
      const down = rect.top >= frame.top - 1 && rect.bottom <= frame.bottom + 1;
      if (!across || !down) faults.push(`outside its drawing: ${name(node)}`);
    }
  }
  boxes.sort((a, b) => a.rect.top - b.rect.top);
  for (let i = 0; i < boxes.length; i++) {
    for (let j = i + 1; j < boxes.length && boxes[j].rect.top < boxes[i].rect.bottom; j++) {
      const a = boxes[i].rect, b = boxes[j].rect;
      const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      // A line's box is higher than its letters: a few pixels of two lines may share a place.
      if (across > 1 && down > 5) faults.push(`${name(boxes[i].node)} covers ${name(boxes[j].node)}`);
    }
  }
  return {width: view.innerWidth, dark: view.matchMedia("(prefers-color-scheme: dark)").matches, texts, faults};
}
addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")].map(check);
  document.getElementById("found").textContent = JSON.stringify(found);
});
