// What the page does by itself: images large, tabs in the address, the form remembered, texts copied.
const studio = (window.studio = {});

// ---- images large

const ZOOMS = [1, 1.5, 2, 3, 4, 6, 8];

/** Opens images in a window of their own, the first one shown; arrow keys go on, + and - zoom. */
studio.enlarge = (images, first = 0) => {
  const dialog = document.querySelector("#large") ?? document.body.appendChild(largeDialog());
  const shown = dialog.querySelector("img");
  const view = dialog.querySelector(".view");
  let [at, zoom] = [first, 0];

  const fit = () => {
    const scale = Math.min(view.clientWidth / shown.naturalWidth, view.clientHeight / shown.naturalHeight);
    shown.style.width = `${shown.naturalWidth * scale * ZOOMS[zoom]}px`;
  };
  const show = (step) => {
    at = (at + step + images.length) % images.length;
    shown.onload = fit;
    shown.src = images[at].src;
    shown.alt = images[at].alt;
    dialog.querySelector(".shows").textContent = images[at].alt;
  };
  const zoomBy = (step) => {
    const [x, y] = [view.scrollLeft + view.clientWidth / 2, view.scrollTop + view.clientHeight / 2];
    const before = ZOOMS[zoom];
    zoom = Math.max(0, Math.min(ZOOMS.length - 1, zoom + step));
    fit();
    const grown = ZOOMS[zoom] / before;
    view.scrollTo(x * grown - view.clientWidth / 2, y * grown - view.clientHeight / 2);
  };
  const acts = { previous: () => show(-1), next: () => show(1), out: () => zoomBy(-1), in: () => zoomBy(1) };
  const keys = { ArrowLeft: "previous", ArrowRight: "next", "+": "in", "=": "in", "-": "out" };

  dialog.onclick = ({ target }) => {
    const act = target.closest("[data-act]")?.dataset.act;
    if (act === "close" || target === dialog) dialog.close();
    else if (act) acts[act]();
    else if (target === shown) zoomBy(zoom < 2 ? 2 : -ZOOMS.length);
  };
  dialog.onkeydown = (event) => {
    const act = keys[event.key];
    if (!act) return;
    event.preventDefault();
    acts[act]();
  };
  view.onwheel = (event) => {
    if (!event.ctrlKey) return;
    event.preventDefault();
    zoomBy(event.deltaY < 0 ? 1 : -1);
  };
  for (const name of ["previous", "next"])
    dialog.querySelector(`[data-act=${name}]`).hidden = images.length < 2;
  dialog.showModal();
  show(0);
};

function largeDialog() {
  const dialog = document.createElement("dialog");
  dialog.id = "large";
  dialog.setAttribute("aria-label", "Image, large");
  const button = (act, text, label) =>
    `<button type="button" data-act="${act}" aria-label="${label}">${text}</button>`;
  dialog.innerHTML = `<div class="bar"><span class="shows"></span>
    ${button("previous", "←", "Previous image")}${button("next", "→", "Next image")}
    ${button("out", "−", "Zoom out")}${button("in", "+", "Zoom in")}
    ${button("close", "Close", "Close")}</div>
    <div class="view" tabindex="0" role="group" aria-label="The image, which scrolls when zoomed"><img alt=""></div>`;
  return dialog;
}

document.addEventListener("click", ({ target }) => {
  const box = target.closest(".zoomable");
  const image = target.closest("img") ?? target.closest("button")?.querySelector("img");
  if (!box || !image) return;
  const images = [...box.querySelectorAll("img")];
  studio.enlarge(images, images.indexOf(image));
});

// ---- models

/** Returns the path of the server's root, with a slash at its end. */
const root = () => `${new URL(window.gradio_config.root, location.href).pathname.replace(/\/$/, "")}/`;

/** Returns the page's title. Gradio knows that of the first model alone. */
const title = () => {
  const page = window.gradio_config.current_page;
  return page ? `Studio · ${page}` : document.title;
};

const address = (page) => `${root()}${page}${location.search}`;

/** Gives the page its title, and the list of models their addresses. */
const nameModels = () => {
  document.title = title();
  for (const link of document.querySelectorAll(".models a"))
    link.href = address(link.dataset.page);
};

document.addEventListener("click", ({ target }) => {
  for (const list of document.querySelectorAll(".models[open]"))
    if (!list.contains(target)) list.open = false;
});
document.addEventListener("keydown", ({ key }) => {
  const list = document.querySelector(".models[open]");
  if (key !== "Escape" || !list) return;
  list.open = false;
  list.querySelector("summary").focus();
});

// ---- tabs in the address

let going = true;

const tab = (place) => document.querySelector(`[role=tab][data-tab-id="${place}"]`);
const isOpen = (place) => tab(place)?.getAttribute("aria-selected") === "true";

/** Returns the address of a place on this page. A bare "#place" would be one on the page of the first model. */
const here = (place) => `${location.pathname}${location.search}#${place}`;

/** Writes the place that was opened into the address, so that "back" returns from it. */
studio.opened = (place) => {
  if (place === "look") place = isOpen("film") ? "film" : "scan";
  if (!going && location.hash !== `#${place}`) history.pushState(null, "", here(place));
};

/** Opens the place that the address names. */
studio.go = () => {
  nameModels();
  const first = () => document.querySelector("#tabs [role=tab][aria-selected=true]")?.dataset.tabId ?? "edit";
  if (!location.hash) history.replaceState(null, "", here(first()));
  const place = location.hash.slice(1);
  const path = { scan: ["look", "scan"], film: ["look", "film"] }[place] ?? [place];
  going = true;
  const follow = (tries) => {
    const next = path.find((step) => !isOpen(step));
    if (next) tab(next)?.click();
    if (next && tries) return setTimeout(() => follow(tries - 1), 50);
    if (next && !tab(next)) history.replaceState(null, "", here(first())); // this model has no such tab
    [going, studio.ready] = [false, true];
  };
  follow(20);
};
window.addEventListener("popstate", studio.go);

// ---- words, copies, fields

document.addEventListener(
  "click",
  (event) => {
    const word = event.target.closest('a[href^="#word-"]')?.getAttribute("href");
    if (!word) return;
    event.preventDefault();
    const about = document.querySelector(word);
    about.closest("details").open = true;
    about.scrollIntoView({ block: "center" });
    about.focus();
  },
  true,
);

/** Puts a text into the clipboard, also where the page is not served by HTTPS, and says so on the button. */
studio.copy = (text) => {
  const button = document.activeElement;
  const area = document.body.appendChild(document.createElement("textarea"));
  area.value = text;
  area.select();
  document.execCommand("copy");
  area.remove();
  button.focus();
  const label = button.textContent;
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = label), 1500);
};

/** Shows a field: scrolls to it and puts the cursor at its end. */
studio.focus = (selector) =>
  setTimeout(() => {
    const field = document.querySelector(selector);
    field?.scrollIntoView({ block: "center" });
    field?.focus({ preventScroll: true });
    field?.setSelectionRange?.(field.value.length, field.value.length);
  }, 300);

/** Opens a fold and shows it. */
studio.unfold = (selector) => {
  document.querySelector(`${selector} details`).open = true;
  studio.focus(`${selector} summary`);
};

/**
 * Shows what the open tab shows: scrolls to its image and puts the focus there. An image that another model made is
 * `elsewhere`, as JSON of its page and its name: the page is opened, and `studio.bring` asks for the image there.
 */
studio.look = (elsewhere) => {
  if (elsewhere) {
    const { page, image } = JSON.parse(elsewhere);
    sessionStorage.setItem("studio-wanted", image);
    return location.assign(address(page));
  }
  setTimeout(() => {
    const shown = [...document.querySelectorAll(".outputs")].find((column) => column.offsetParent);
    shown.tabIndex = -1;
    shown.scrollIntoView({ block: "start" });
    shown.focus({ preventScroll: true });
  }, 300);
};

/** Brings back the image for which this page was opened, if it was opened for one. */
studio.bring = () => sessionStorage.getItem("studio-wanted") && document.querySelector("#bring").click();

/** Returns the name of that image, once. */
studio.wanted = () => {
  const image = sessionStorage.getItem("studio-wanted");
  sessionStorage.removeItem("studio-wanted");
  return image;
};

// ---- masks painted

const PAINT = "#ff7a00";

/**
 * Builds a board beside a component whose value is {image, painted}: a file to paint on, and what is painted, as the
 * address of a PNG. Paint is opaque, so that what is erased is gone.
 */
studio.painter = (element, props, watch, about, isOpen) => {
  const box = document.createElement("details");
  box.className = "painter";
  box.open = isOpen;
  const tool = (name, text) => `<button type="button" data-tool="${name}" aria-pressed="false">${text}</button>`;
  box.innerHTML = `<summary></summary><p>${about}</p>
    <p class="nothing">Press Reference, or upload a photograph, to paint on it.</p>
    <div class="tools" role="toolbar" aria-label="Painting">${tool("paint", "Paint")}${tool("erase", "Erase")}
      <label>Size <input type="range" min="4" max="128" value="32"></label>
      <button type="button" data-tool="clear">Clear</button></div>
    <div class="board"><img alt="The reference, under the mask"><canvas role="img" aria-label="The mask"></canvas></div>`;
  element.parentElement.append(box);
  const [image, canvas, size] = ["img", "canvas", "input"].map((name) => box.querySelector(name));
  const context = canvas.getContext("2d");
  let [erasing, last, turn] = [false, null, 0];

  const show = async () => {
    const { image: file, painted } = props.value ?? {};
    const own = ++turn;
    box.classList.toggle("empty", !file);
    box.querySelector("summary").textContent = painted ? "Mask (painted)" : "Mask";
    if (!file) return;
    image.src = file.url;
    const mask = Object.assign(new Image(), { src: painted ?? "" });
    await Promise.all([image.decode(), painted && mask.decode()]);
    if (own !== turn) return;
    [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
    if (painted) context.drawImage(mask, 0, 0, canvas.width, canvas.height);
  };
  const keep = (painted) => {
    props.value = { ...props.value, painted };
    box.querySelector("summary").textContent = painted ? "Mask (painted)" : "Mask";
  };
  const choose = (name) => {
    erasing = name === "erase";
    for (const button of box.querySelectorAll("[aria-pressed]"))
      button.setAttribute("aria-pressed", button.dataset.tool === name);
  };
  const stroke = (event) => {
    const scale = canvas.width / canvas.clientWidth;
    const [x, y] = [event.offsetX * scale, event.offsetY * scale];
    context.globalCompositeOperation = erasing ? "destination-out" : "source-over";
    Object.assign(context, { strokeStyle: PAINT, lineWidth: size.value * scale, lineCap: "round" });
    context.beginPath();
    context.moveTo(...(last ?? [x, y]));
    context.lineTo(x, y);
    context.stroke();
    last = [x, y];
  };

  box.querySelector(".tools").addEventListener("click", ({ target }) => {
    const name = target.dataset.tool;
    if (name === "clear") {
      context.clearRect(0, 0, canvas.width, canvas.height);
      keep(null);
    } else if (name) choose(name);
  });
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    stroke(event);
  });
  canvas.addEventListener("pointermove", (event) => last && stroke(event));
  canvas.addEventListener("pointerup", () => {
    last = null;
    keep(canvas.toDataURL("image/png"));
  });
  watch("value", show);
  choose("paint");
  show();
};

// ---- the form remembered

const stored = (name) => `studio-${name}-${root()}`;
const formKey = () => stored(`form-${title()}`); // each model has a form of its own
let [undone, last, waiting] = [[], null, 0];

/** Remembers the form's values across reloads, and each earlier state for `undo`. */
studio.remember = (names, values) => {
  const form = Object.fromEntries(names.map((name, i) => [name, values[i]]));
  clearTimeout(waiting);
  waiting = setTimeout(() => {
    if (JSON.stringify(form) === JSON.stringify(last)) return;
    if (last) undone.push(last);
    last = form;
    localStorage.setItem(formKey(), JSON.stringify(form));
  }, 300);
};

/** Returns the values that the form had before the page was loaded again, or else those it has. */
studio.recall = (names, values) => {
  const form = JSON.parse(localStorage.getItem(formKey()) ?? "{}");
  last = Object.fromEntries(names.map((name, i) => [name, form[name] ?? values[i]]));
  return names.map((name) => last[name]);
};

/** Returns the values that the form had before it was last changed. */
studio.undo = (names, values) => {
  const form = undone.pop();
  if (!form) return values;
  last = form;
  localStorage.setItem(formKey(), JSON.stringify(form));
  return names.map((name) => form[name]);
};

/** Returns the secret that names this browser's visit; the first time it is drawn. */
studio.visit = () => {
  const fresh = () =>
    Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
  const visit = localStorage.getItem(stored("visit")) ?? fresh();
  localStorage.setItem(stored("visit"), visit);
  return visit;
};
