() => {
  // On a narrow screen the list of chats covers the chat: close it on opening and after a choice
  const narrow = matchMedia("(max-width: 768px)");
  const closeList = () => { if (narrow.matches) document.querySelector(".sidebar.open > .toggle-button")?.click(); };
  closeList();
  document.querySelector(".sidebar").addEventListener("click", ({ target }) => {
    if (target.closest(".history input, .begin button")) closeList();
  });
  // Groups of the list are called as their headings
  const nameGroups = () => {
    for (const group of document.querySelectorAll(".history")) {
      const heading = group.querySelector("[data-testid=block-info]")?.textContent ?? "";
      if (group.ariaLabel !== heading) group.ariaLabel = heading;
    }
  };

  // Images open enlarged; a click or Escape closes them
  document.addEventListener("click", ({ target }) => {
    const picture = target.closest(".message.component")?.querySelector("img");
    if (!picture) return;
    const dialog = document.createElement("dialog");
    dialog.className = "picture";
    dialog.append(picture.cloneNode());
    dialog.addEventListener("click", () => dialog.close());
    dialog.addEventListener("close", () => dialog.remove());
    document.body.append(dialog);
    dialog.showModal();
  });

  // Scroll with growing text unless the user has scrolled up; a new question scrolls to the end
  let follows = true, lastTop = 0, lastQuestions = 0;
  const follow = () => {
    const log = document.querySelector("[role=log]"), questions = document.querySelectorAll(".user-row").length;
    if (!log) return;
    if (questions !== lastQuestions || log.scrollTop + log.clientHeight > log.scrollHeight - 2) follows = true;
    else if (log.scrollTop < lastTop - 1) follows = false;
    lastQuestions = questions;
    if (follows) log.scrollTop = log.scrollHeight;
    lastTop = log.scrollTop;
  };
  for (const event of ["scroll", "load"]) document.addEventListener(event, follow, true);
  // Decode the character references of questions and remove the invisible joiners of answers (render.py)
  const decode = (text) => text.replace(/&#(\d+);/g, (_, code) => String.fromCodePoint(code));
  const withoutJoiners = (text) => text.replaceAll("\u2060", "");
  const edited = new WeakSet();
  const decodeEdited = () => {
    for (const area of document.querySelectorAll(".edit-textarea")) {
      if (edited.has(area)) continue;
      edited.add(area);
      area.value = decode(area.value);
      area.dispatchEvent(new Event("input", { bubbles: true }));
    }
  };
  if (navigator.clipboard) {
    const write = navigator.clipboard.writeText.bind(navigator.clipboard);
    navigator.clipboard.writeText = (text) => write(withoutJoiners(decode(text)));
  }
  document.addEventListener("copy", (event) => {
    const field = document.activeElement, inField = "selectionStart" in field;
    const text = inField ? field.value.slice(field.selectionStart, field.selectionEnd) : String(getSelection());
    const hidden = field.parentElement === document.body;  // Gradio copies from it without https
    const plain = withoutJoiners(hidden ? decode(text) : text);
    if (plain === text) return;
    event.clipboardData.setData("text/plain", plain);
    event.preventDefault();
  });

  new MutationObserver(() => {
    follow();
    decodeEdited();
    nameGroups();
    for (const button of document.querySelectorAll(".message.component button:not([aria-label])"))
      button.ariaLabel = "Open the picture large";
  }).observe(document.body, { childList: true, subtree: true, characterData: true });

  // Images can be dropped anywhere
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    if (!event.dataTransfer.files.length || event.target.closest(".multimodal-textbox")) return;
    event.preventDefault();
    const input = document.querySelector(".multimodal-textbox input[type=file]");
    input.files = event.dataTransfer.files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
  });

  // Typed text survives a reload, which Gradio triggers after a lost connection
  const box = document.querySelector("textarea[placeholder^='Ask a question']");
  try {
    box.value = sessionStorage.getItem("typed") ?? "";
    box.dispatchEvent(new Event("input", { bubbles: true }));
    window.addEventListener("pagehide", () => sessionStorage.setItem("typed", box.value));
  } catch (error) {
    if (error.name !== "SecurityError") throw error;  // a notebook's frame without storage
  }

  // Back and Forward switch conversations
  window.addEventListener("popstate", () => location.reload());
}
