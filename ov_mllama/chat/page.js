() => {
  // On a narrow screen the list of chats covers the chat: close it on opening and after a choice
  const narrow = matchMedia("(max-width: 768px)");
  const closeList = () => { if (narrow.matches) document.querySelector(".sidebar.open > .toggle-button")?.click(); };
  closeList();
  document.querySelector(".sidebar").addEventListener("click", ({ target }) => {
    if (target.closest(".history input, .begin button")) closeList();
  });
  document.querySelector(".detail").ariaLabel = "How closely pictures are looked at";
  const sidebar = document.querySelector(".sidebar");
  [sidebar.role, sidebar.ariaLabel] = ["navigation", "Chats and settings"];
  // Groups of the list are called as their headings
  const nameGroups = () => {
    for (const group of document.querySelectorAll(".history")) {
      const heading = group.querySelector("[data-testid=block-info]")?.textContent ?? "";
      if (group.ariaLabel !== heading) group.ariaLabel = heading;
    }
  };

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

  // Files of a drop, a paste or a region go the way of chosen ones
  const addFiles = (files) => {
    const input = document.querySelector(".multimodal-textbox input[type=file]"), data = new DataTransfer();
    for (const file of files) data.items.add(file);
    input.files = data.files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
  };

  // Images open enlarged; a click or Escape closes them. A region can be cut out, in the image's own pixels
  const LARGE = ".message.component, .thumbnail-wrapper";
  document.addEventListener("click", ({ target }) => {
    const picture = !target.closest(".delete-button") && target.closest(LARGE)?.querySelector("img");
    if (picture && !(picture.complete && !picture.naturalWidth)) openLarge(picture);  // no HEIC in most browsers
  });
  const element = (tag, properties, ...children) => {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  };
  const openLarge = (picture) => {
    const image = element("img", { src: picture.src, alt: "", draggable: false });
    const frame = element("div", { className: "region", tabIndex: 0, hidden: true });
    const size = element("output"), begin = element("button", { textContent: "Ask about a region", disabled: true });
    const use = element("button", { textContent: "Use region", hidden: true });
    const cancel = element("button", { textContent: "Cancel", hidden: true });
    const figure = element("figure", {}, image, frame), buttons = element("p", {}, size, begin, use, cancel);
    const dialog = element("dialog", { className: "picture", ariaLabel: "Picture" }, figure, buttons);
    frame.setAttribute("role", "application");  // so that a screen reader leaves it the arrow keys
    frame.ariaLabel = "Region: arrow keys move it, with Shift they change its size, Enter uses it";
    image.addEventListener("load", () => {
      figure.style.setProperty("--ratio", image.naturalWidth / image.naturalHeight);
      figure.style.setProperty("--width", `${image.naturalWidth}px`);
      begin.disabled = false;
    });
    let [left, top, width, height] = [0.25, 0.25, 0.5, 0.5];  // fractions of the image
    const pixels = () => {
      const across = (part) => Math.round(part * image.naturalWidth), x = across(left);
      const down = (part) => Math.round(part * image.naturalHeight), y = down(top);
      return [x, y, across(left + width) - x, down(top + height) - y];
    };
    const show = (...wished) => {
      const least = [image.naturalWidth, image.naturalHeight].map((side) => Math.min(1, 16 / side));
      [width, height] = [2, 3].map((i) => Math.min(1, Math.max(least[i - 2], wished[i])));
      [left, top] = [0, 1].map((i) => Math.min(1 - [width, height][i], Math.max(0, wished[i])));
      ["left", "top", "width", "height"].forEach((name, i) =>
        frame.style[name] = `${100 * [left, top, width, height][i]}%`);
      size.textContent = `${pixels()[2]} × ${pixels()[3]} pixels`;
    };
    const crop = () => {
      const [x, y, across, down] = pixels(), scale = Math.min(1, Math.sqrt(16e6 / (across * down)));  // of iOS
      const canvas = element("canvas", { width: Math.round(across * scale), height: Math.round(down * scale) });
      canvas.getContext("2d").drawImage(image, x, y, across, down, 0, 0, canvas.width, canvas.height);
      canvas.toBlob((blob) => addFiles([new File([blob], "region.png", { type: "image/png" })]));
      dialog.close();
      document.querySelector("textarea[placeholder^='Ask a question']").focus();
    };
    begin.addEventListener("click", () => {
      for (const part of [frame, use, cancel]) part.hidden = false;
      begin.hidden = true;
      dialog.classList.add("selecting");
      show(left, top, width, height);
      frame.focus();
    });
    use.addEventListener("click", crop);
    dialog.addEventListener("click", ({ target }) => {
      if (target === cancel || !begin.hidden) dialog.close();
    });
    dialog.addEventListener("keydown", (event) => {
      const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
      const step = steps[event.key]?.map((direction) => direction / 50);
      if (event.target !== frame || !(step || event.key === "Enter")) return;
      event.preventDefault();
      if (!step) crop();
      else if (event.shiftKey) show(left, top, width + step[0], height + step[1]);
      else show(left + step[0], top + step[1], width, height);
    });
    let anchor;
    const at = ({ clientX, clientY }) => {
      const area = image.getBoundingClientRect();
      return [(clientX - area.left) / area.width, (clientY - area.top) / area.height]
        .map((part) => Math.min(1, Math.max(0, part)));
    };
    figure.addEventListener("pointerdown", (event) => {
      if (!begin.hidden) return;
      event.preventDefault();
      figure.setPointerCapture(event.pointerId);
      anchor = at(event);
    });
    figure.addEventListener("pointermove", (event) => {
      if (!anchor) return;
      const end = at(event);
      show(...[0, 1].map((i) => Math.min(anchor[i], end[i])), ...[0, 1].map((i) => Math.abs(anchor[i] - end[i])));
    });
    for (const end of ["pointerup", "pointercancel"]) figure.addEventListener(end, () => { anchor = null; });
    dialog.addEventListener("close", () => dialog.remove());
    document.body.append(dialog);
    dialog.showModal();
  };

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
      area.value = area.closest(".bot-row") ? withoutJoiners(area.value) : decode(area.value);
      area.dispatchEvent(new Event("input", { bubbles: true }));
    }
  };
  // An edit ends with the chat or variant that it began in: Gradio leaves it open at the same place of another one
  let begunIn = "";
  const place = () => location.search +
    [...document.querySelectorAll("[name=flip]")].map((button) => button.value + button.parentElement.innerText);
  document.addEventListener("click", ({ target }) => {
    if (target.closest("[role=log] [aria-label=Edit]")) begunIn = place();
  }, true);
  const endStrayEdit = () => {
    if (!document.querySelector(".message-row")) begunIn = "ended";  // a new chat
    if (document.querySelector(".edit-textarea") && place() !== begunIn)
      document.querySelector("[role=log] [aria-label=Cancel]")?.click();
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

  // Buttons that flip between variants (render.py, layout.py FLIP); the focus stays where the page draws them anew
  let flipped = "";
  document.addEventListener("click", ({ target, isTrusted }) => {
    if (!isTrusted) return;  // of this script
    flipped = target.name === "flip" ? target.value : "";
    if (!flipped) return;
    const sender = document.querySelector("#flip");
    sender.dataset.choice = flipped;
    sender.click();
  });
  const nameFlips = () => {
    for (const button of document.querySelectorAll("[name=flip]:not([aria-label])")) {
      button.ariaLabel = button.title;
      button.closest("[data-testid]").ariaLabel = `Answer ${button.parentElement.innerText.trim()}`;
    }
    if (flipped && document.activeElement === document.body)
      document.querySelector(`[name=flip][value="${flipped}"]`)?.focus({ preventScroll: true });
  };
  // The focus of a button that goes away with what it closes, submits or deletes goes on to the next thing to do
  let closed = "";
  const NEXT = { ".looked-head button": ".options .option:last-of-type" };
  for (const button of [".top button", "[role=log] [aria-label=Submit]"]) NEXT[button] = ".multimodal-textbox textarea";
  document.addEventListener("click", ({ target, isTrusted }) => {
    if (isTrusted) closed = Object.keys(NEXT).find((button) => target.closest(button)) ?? "";
  }, true);
  const passFocus = () => {
    const { activeElement: focused, body } = document;
    if (!closed || focused !== body && focused.checkVisibility({ visibilityProperty: true })) return;
    document.querySelector(NEXT[closed])?.focus({ preventScroll: true });
  };
  // Status lines do not fold, and are no buttons
  const inStatus = (event) => { if (event.target.closest?.(".thought-group .title")) event.stopPropagation(); };
  for (const kind of ["click", "keydown"]) document.addEventListener(kind, inStatus, true);
  // The words of an answer are one tab stop, and arrow keys choose: Gradio gives each radio button a name of its own
  const words = () => [...document.querySelectorAll(".words input")];
  const oneTabStop = () => {
    const all = words(), stop = all.find((input) => input.checked) ?? all[0];
    for (const input of all) input.tabIndex = input === stop ? 0 : -1;
  };
  document.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step || !event.target.matches(".words input")) return;
    event.preventDefault();
    const all = words(), next = all.at((all.indexOf(event.target) + step) % all.length);
    next.focus();
    next.click();
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
    endStrayEdit();
    nameFlips();
    passFocus();
    for (const title of document.querySelectorAll(".thought-group .title[role]"))
      for (const name of ["role", "tabindex"]) title.removeAttribute(name);
    oneTabStop();
    direct();
    announce();
    nameGroups();
    for (const button of document.querySelectorAll(".message.component button:not([aria-label])"))
      button.ariaLabel = "Open the picture large";
    for (const picture of document.querySelectorAll(".thumbnail-wrapper img:not([role])"))
      Object.assign(picture, { role: "button", tabIndex: 0, ariaLabel: "Open the picture large" });
    // Phones offer their camera for types, not for suffixes; Gradio checks what is chosen by its own list
    for (const input of document.querySelectorAll(".multimodal-textbox input:not([accept^=image])"))
      input.accept = `image/*, ${input.accept}`;
  }).observe(document.body, { childList: true, subtree: true, characterData: true });

  // Files can be dropped and pasted anywhere
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    if (!event.dataTransfer.files.length || event.target.closest(".multimodal-textbox")) return;
    event.preventDefault();
    addFiles(event.dataTransfer.files);
  });
  document.addEventListener("paste", (event) => {
    const inBox = event.target.closest(".multimodal-textbox");  // Gradio takes images there
    const files = [...event.clipboardData.files].filter((file) => !inBox || !file.type.startsWith("image/"));
    if (!files.length || event.clipboardData.getData("text")) return;  // of a table, say, which is an image too
    event.preventDefault();
    addFiles(files);
  });
  document.addEventListener("keydown", (event) => {
    if (!event.target.matches(".thumbnail-wrapper img") || !["Enter", " "].includes(event.key)) return;
    event.preventDefault();
    event.target.click();
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
