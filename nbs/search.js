// The search of the site, under the name that its pages ask for. Every word must be found; a title counts more than a
// heading, a heading more than text, the beginning of a word more than its middle; a page comes before its sections,
// what every reader may want before the library, the library before manifests and files (`rank`).
window.Fuse = class {
  constructor(entries) {
    const simple = (s) => (s || "").toLowerCase();
    this.entries = entries.map((item) => ({ item, fields: [[simple(item.title), 60], [simple(item.section), 50], [simple(item.text), 10], [item.section ? "" : simple(item.name).replace(/[._]/g, " "), 60]] }));
  }

  // how well a word fits a text: whole 1, at the beginning of a word .8, inside one .3
  static fit(text, word) {
    if (text === word) return 1.5;
    let best = 0;
    for (let i = text.indexOf(word); i >= 0 && best < 1; i = text.indexOf(word, i + 1)) {
      const starts = i === 0 || !/[\p{L}\p{N}]/u.test(text[i - 1]);
      const ends = i + word.length === text.length || !/[\p{L}\p{N}]/u.test(text[i + word.length]);
      best = Math.max(best, starts && ends ? 1 : starts ? 0.8 : 0.3);
    }
    return best;
  }

  search(query, { limit = 20 } = {}) {
    const words = query.toLowerCase().split(/\s+/).filter(Boolean);
    const phrase = words.join(" ");
    const found = [];
    for (const { item, fields } of this.entries) {
      let score = 0;
      const all = words.every((word) => {
        const best = Math.max(...fields.map(([text, weight], i) => (item.section && i === 0 ? 0.4 : 1) * weight * Fuse.fit(text, word)));
        score += best;
        return best > 0;
      });
      if (!all) continue;
      if (words.length > 1 && fields.some(([text]) => text.includes(phrase))) score += 30;
      found.push({ item, score: score / words.length + (item.section ? 0 : 15) - 12 * item.rank });
    }
    return found.sort((a, b) => b.score - a.score).slice(0, limit);
  }
};
