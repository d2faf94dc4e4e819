() => {
  // On a narrow screen the list of chats is over the chat: it is closed at first, and when one was chosen
  const narrow = matchMedia("(max-width: 768px)");
  const closeList = () => { if (narrow.matches) document.querySelector(".sidebar.open > .toggle-button")?.click(); };
  closeList();
  document.querySelector(".sidebar").addEventListener("click", ({ target }) => {
    if (target.closest(".history input, .sidebar-content > .column > button")) closeList();
  });
  document.querySelector(".history").ariaLabel = "Earlier chats";

  // Pictures open large, and close at a click or Escape
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

  // Text that grows is followed by who is at its end, not by who has scrolled up; a question brings everybody there
  let follows = true, left = 0, asked = 0;
  const follow = () => {
    const log = document.querySelector("[role=log]"), questions = document.querySelectorAll(".user-row").length;
    if (!log) return;
    if (questions !== asked || log.scrollTop + log.clientHeight > log.scrollHeight - 2) follows = true;
    else if (log.scrollTop < left - 1) follows = false;
    asked = questions;
    if (follows) log.scrollTop = log.scrollHeight;
    left = log.scrollTop;
  };
  for (const event of ["scroll", "load"]) document.addEventListener(event, follow, true);
  // Questions come as character references, and answers with invisible joiners, so that no text is markup (shown.py)
  const asTyped = (text) => text.replace(/&#(\d+);/g, (_, code) => String.fromCodePoint(code));
  const withoutJoiners = (text) => text.replaceAll("\u2060", "");
  const edited = new WeakSet();
  const editAsTyped = () => {
    for (const area of document.querySelectorAll(".edit-textarea")) {
      if (edited.has(area)) continue;
      edited.add(area);
      area.value = asTyped(area.value);
      area.dispatchEvent(new Event("input", { bubbles: true }));
    }
  };
  if (navigator.clipboard) {
    const write = navigator.clipboard.writeText.bind(navigator.clipboard);
    navigator.clipboard.writeText = (text) => write(withoutJoiners(asTyped(text)));
  }
  document.addEventListener("copy", (event) => {
    const field = document.activeElement, inField = "selectionStart" in field;
    const text = inField ? field.value.slice(field.selectionStart, field.selectionEnd) : String(getSelection());
    const unseen = field.parentElement === document.body;  // where Gradio copies from on a page without https
    const plain = withoutJoiners(unseen ? asTyped(text) : text);
    if (plain === text) return;
    event.clipboardData.setData("text/plain", plain);
    event.preventDefault();
  });

  new MutationObserver(() => {
    follow();
    editAsTyped();
    for (const button of document.querySelectorAll(".message.component button:not([aria-label])"))
      button.ariaLabel = "Open the picture large";
  }).observe(document.body, { childList: true, subtree: true, characterData: true });

  // Pictures may be dropped anywhere
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    if (!event.dataTransfer.files.length || event.target.closest(".multimodal-textbox")) return;
    event.preventDefault();
    const input = document.querySelector("input[type=file]");
    input.files = event.dataTransfer.files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
  });

  // What was typed is still there when the page is loaded again, as Gradio does when the server was away
  const box = document.querySelector("textarea[placeholder^='Ask a question']");
  try {
    box.value = sessionStorage.getItem("typed") ?? "";
    box.dispatchEvent(new Event("input", { bubbles: true }));
    window.addEventListener("pagehide", () => sessionStorage.setItem("typed", box.value));
  } catch (error) {
    if (error.name !== "SecurityError") throw error;  // a notebook's frame, in a browser that lets it keep nothing
  }

  // Back and Forward go through conversations
  window.addEventListener("popstate", () => location.reload());
}
