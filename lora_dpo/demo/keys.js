// Keys of the Vote tab, which press its buttons and do nothing while someone types; and the way through the tabs.
(() => {
  const KEYS = {
    "1": "vote-a", ArrowLeft: "vote-a",
    "2": "vote-b", ArrowRight: "vote-b",
    "3": "vote-good",
    "4": "vote-bad",
    "0": "vote-skip", s: "vote-skip",
    n: "vote-next",
  };
  const TYPING = "input, textarea, select, [contenteditable], [role=listbox]";

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
    if (event.target?.closest?.(TYPING)) return;
    const button = document.getElementById(KEYS[event.key]);
    if (!button || button.disabled || button.offsetParent === null) return;
    event.preventDefault();
    button.click();
  });

  const follow = (event) => {
    const step = event.target?.closest?.("[data-tab]");
    if (!step || (event.type === "keydown" && event.key !== "Enter")) return;
    const tabs = [...document.querySelectorAll("button[role=tab]")];
    tabs.find((tab) => tab.textContent.trim() === step.dataset.tab && tab.offsetParent)?.click();
  };
  document.addEventListener("click", follow);
  document.addEventListener("keydown", follow);
})();
