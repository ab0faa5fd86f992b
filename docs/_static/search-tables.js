// A box above each table marked `searchable`: rows stay that hold every word that is typed.
document.addEventListener("DOMContentLoaded", () => {
  for (const part of document.querySelectorAll(".searchable")) {
    const rows = [...part.querySelectorAll("tbody tr")];
    const box = document.createElement("input");
    const count = document.createElement("small");
    box.type = "search";
    box.className = "searchable-box";
    box.placeholder = "Search this table";
    box.setAttribute("aria-label", "Search this table");
    const show = () => {
      const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
      let kept = 0;
      for (const row of rows) {
        const text = row.textContent.toLowerCase();
        row.hidden = !words.every((word) => text.includes(word));
        kept += !row.hidden;
      }
      count.textContent = ` ${kept} of ${rows.length}`;
    };
    box.addEventListener("input", show);
    part.prepend(box, count);
    show();
  }
});
