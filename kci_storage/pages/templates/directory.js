"use strict";
(() => {
  const box = document.getElementById("filter");
  const summary = document.getElementById("summary");
  const everything = summary.textContent;
  const rows = [...document.querySelectorAll("tbody > tr:not(.up)")].map((element) => ({
    element,
    name: element.querySelector("a").textContent.toLowerCase(),
  }));

  const inWords = (number) => number.toLocaleString("en");

  function filter() {
    const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const { element, name } of rows) {
      const matches = words.every((word) => name.includes(word));
      element.hidden = !matches;
      count += matches;
    }
    summary.textContent = words.length ? `${inWords(count)} of ${inWords(rows.length)} shown` : everything;
  }

  function onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "/" && event.target !== box) {
      event.preventDefault();
      box.select();
    } else if (event.key === "Escape" && event.target === box) {
      box.value = ""; // which some browsers do by themselves
      filter();
    }
  }

  box.addEventListener("input", filter);
  document.addEventListener("keydown", onKey);
  window.addEventListener("pageshow", filter); // the browser's Back restores what was typed
  box.hidden = false;
})();
