() => {
  // On a narrow screen the list of chats covers the chat: close it on opening and after a choice
  const narrow = matchMedia("(max-width: 768px)");
  const closeList = () => { if (narrow.matches) document.querySelector(".sidebar.open > .toggle-button")?.click(); };
  closeList();
  document.querySelector(".sidebar").addEventListener("click", ({ target }) => {
    if (target.closest(".history input, .sidebar-content > .column > button")) closeList();
  });
  document.querySelector(".history").ariaLabel = "Earlier chats";
  document.querySelector(".detail").ariaLabel = "How closely pictures are looked at";
  const sidebar = document.querySelector(".sidebar");
  [sidebar.role, sidebar.ariaLabel] = ["navigation", "Chats and settings"];

  // Screen readers hear when an answer begins and ends, and errors; while it grows, its text is not read again and again
  const status = document.createElement("div");
  [status.role, status.className] = ["status", "announced"];
  document.body.append(status);
  let wasBusy = false, lastError = "";
  const announce = () => {
    const busy = !!document.querySelector(".stop-button"), log = document.querySelector("[role=log]");
    const error = [...document.querySelectorAll(".foot p")].map((p) => p.innerText).find((t) => t.startsWith("⚠️")) ?? "";
    if (log) log.ariaBusy = busy;
    if (busy !== wasBusy) status.textContent = busy ? "Answering" : "Ready for a question";
    if (error && error !== lastError) status.textContent = error;
    [wasBusy, lastError] = [busy, error];
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

  // Each block of text has the direction of its own language; code stays left to right (page.css)
  const directed = ".message .md > :not(pre, .code_wrap), textarea, .history label span";
  const direct = () => {
    for (const text of document.querySelectorAll(directed)) if (text.dir !== "auto") text.dir = "auto";
    for (const message of document.querySelectorAll(".message > [aria-label*='&#'], .message > [aria-label*='\u2060']"))
      message.ariaLabel = withoutJoiners(decode(message.ariaLabel));
  };

  new MutationObserver(() => {
    follow();
    decodeEdited();
    direct();
    announce();
    for (const button of document.querySelectorAll(".message.component button:not([aria-label])"))
      button.ariaLabel = "Open the picture large";
  }).observe(document.body, { childList: true, subtree: true, characterData: true });

  // Images can be dropped anywhere
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    if (!event.dataTransfer.files.length || event.target.closest(".multimodal-textbox")) return;
    event.preventDefault();
    const input = document.querySelector("input[type=file]");
    input.files = event.dataTransfer.files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
  });

  // Enter that ends the composition of a word (IME) neither sends nor renames; Safari reports it by the code 229 alone
  for (const kind of ["keydown", "keypress"])
    document.addEventListener(kind, (event) => {
      if (event.key !== "Enter" || !(event.isComposing || event.keyCode === 229)) return;
      event.stopImmediatePropagation();
      if (kind === "keypress") event.preventDefault();  // a line break
    }, true);

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
