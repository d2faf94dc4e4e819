() => {
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

  // Text that grows is followed only by who is at its end
  let follows = true;
  const log = () => document.querySelector("[role=log]");
  document.addEventListener("scroll", ({ target }) => {
    if (target === log()) follows = target.scrollTop + target.clientHeight > target.scrollHeight - 40;
  }, true);
  new MutationObserver(() => { if (follows && log()) log().scrollTop = log().scrollHeight; })
    .observe(document.body, { childList: true, subtree: true, characterData: true });

  // Pictures may be dropped anywhere
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    if (!event.dataTransfer.files.length || event.target.closest(".multimodal-textbox")) return;
    event.preventDefault();
    const input = document.querySelector("input[type=file]");
    input.files = event.dataTransfer.files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
  });

  // Back and Forward go through conversations
  window.addEventListener("popstate", () => location.reload());
}
