// Keys of the Vote tab. They press its buttons, and do nothing while someone types.
(() => {
  const KEYS = {
    "1": "vote-a", ArrowLeft: "vote-a",
    "2": "vote-b", ArrowRight: "vote-b",
    "3": "vote-good",
    "4": "vote-bad",
    "0": "vote-skip", s: "vote-skip",
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
})();
