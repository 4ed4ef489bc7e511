// The texts of a page whose contrast is below what can be read (WCAG AA: 4.5, large ones 3), each colour once.
(() => {
  const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d", { willReadFrequently: true });
  const known = new Map();
  const parse = (colour) => {
    if (!known.has(colour)) {
      canvas.clearRect(0, 0, 1, 1);
      canvas.fillStyle = colour;
      canvas.fillRect(0, 0, 1, 1);
      const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
      known.set(colour, [r, g, b, a / 255]);
    }
    return known.get(colour);
  };
  const over = (top, below) => top.slice(0, 3).map((x, i) => x * top[3] + below[i] * (1 - top[3]));
  const light = (rgb) => {
    const [r, g, b] = rgb.map((x) => (x /= 255) <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = new Map();
  const background = (node) => {
    if (!node) return [255, 255, 255];
    if (!behind.has(node)) behind.set(node, over(parse(getComputedStyle(node).backgroundColor), background(node.parentElement)));
    return behind.get(node);
  };
  const faults = new Map(), seen = new Set();
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || seen.has(node) || node.closest("script, style, noscript, svg")) continue;
    seen.add(node);
    if (!node.checkVisibility({ opacityProperty: true, visibilityProperty: true })) continue;
    const style = getComputedStyle(node), ground = background(node);
    let opacity = 1;
    for (let n = node; n; n = n.parentElement) opacity *= parseFloat(getComputedStyle(n).opacity);
    const [r, g, b, a] = parse(style.color);
    const ink = over([r, g, b, a * opacity], ground);
    const [x, y] = [light(ink), light(ground)];
    const ratio = (Math.max(x, y) + 0.05) / (Math.min(x, y) + 0.05);
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    if (ratio < (large ? 3 : 4.5) - 0.005) {
      const key = `${ink.map(Math.round)} on ${ground.map(Math.round)}`;
      if (!faults.has(key)) faults.set(key, `${ratio.toFixed(2)}: ${key}: ${node.tagName}.${node.className} ${node.textContent.trim().slice(0, 40)}`);
    }
  }
  return [...faults.values()];
})()
