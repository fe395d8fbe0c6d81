"use strict";
(() => {
  const search = document.querySelector("input[type=search]");
  if (!search) return;
  const sites = Array.from(document.querySelectorAll(".site"), (element) => ({
    element,
    text: `${element.dataset.owner} ${element.textContent}`.toLowerCase(),
  }));
  const folds = Array.from(document.querySelectorAll(".tree details"), (element) => ({
    element,
    open: element.open,
    sites: element.querySelectorAll(".site"),
  }));
  const chips = Array.from(document.querySelectorAll(".chip"));
  const said = document.querySelector("output");
  const key = (fact) => fact.replace(/ (\w)/g, (_, letter) => letter.toUpperCase());
  let filtered = false;

  const chosen = () => {
    const facts = new Map();
    for (const chip of chips) {
      if (chip.getAttribute("aria-pressed") !== "true") continue;
      const fact = key(chip.dataset.fact);
      facts.set(fact, (facts.get(fact) || []).concat(chip.dataset.value));
    }
    return facts;
  };

  const show = () => {
    const facts = chosen();
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const now = words.length > 0 || facts.size > 0;
    if (now && !filtered) for (const fold of folds) fold.open = fold.element.open;
    let count = 0;
    for (const { element, text } of sites) {
      const fits = words.every((word) => text.includes(word)) && Array.from(facts).every(([fact, values]) => {
        const own = (element.dataset[fact] || "").split("|");
        return values.some((value) => own.includes(value));
      });
      element.hidden = !fits;
      count += fits;
    }
    for (const { element, open, sites: own } of folds) {
      const any = Array.from(own).some((site) => !site.hidden);
      element.hidden = !any;
      if (now) element.open = any;
      else if (filtered) element.open = open;
    }
    for (const section of document.querySelectorAll("section")) {
      const own = section.querySelectorAll(".site");
      if (own.length) section.hidden = Array.from(own).every((site) => site.hidden);
    }
    filtered = now;
    said.textContent = `${count} of ${sites.length} ${said.dataset.what}`;
  };

  const reset = () => {
    search.value = "";
    for (const chip of chips) chip.setAttribute("aria-pressed", "false");
    show();
  };
  search.addEventListener("input", show);
  for (const chip of chips) {
    chip.addEventListener("click", () => {
      chip.setAttribute("aria-pressed", String(chip.getAttribute("aria-pressed") !== "true"));
      show();
    });
  }
  document.querySelector("[data-reset]").addEventListener("click", reset);
  for (const button of document.querySelectorAll("[data-fold]")) {
    button.addEventListener("click", () => {
      for (const { element } of folds) element.open = button.dataset.fold === "open";
    });
  }
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && document.activeElement !== search && !event.ctrlKey && !event.metaKey && !event.altKey) {
      event.preventDefault();
      search.focus();
    } else if (event.key === "Escape" && (filtered || document.activeElement === search)) {
      reset();
    }
  });
  show();
})();
