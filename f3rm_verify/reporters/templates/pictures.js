"use strict";
(() => {
  const section = document.getElementById("pictures");
  if (!section) return;
  const byId = (id) => document.getElementById(id);
  const pictures = JSON.parse(byId("picture-data").textContent);
  const viewer = section.querySelector(".viewer"), stage = section.querySelector(".stage");
  const buttons = [...section.querySelectorAll("button[data-picture]")];
  const figures = [...section.querySelectorAll("figure")];
  const split = byId("picture-split"), auto = byId("picture-auto"), region = byId("picture-region");
  const modes = ["side", "slider", "blink", "heat"];
  let current = 0, timer = 0;

  function placeholder() {
    const found = document.createElement("p");
    found.className = "placeholder";
    found.textContent = "not kept";
    return found;
  }
  function shown(picture, view) {
    if (!picture[view]) return placeholder();
    const image = new Image();
    image.decoding = "async";
    image.alt = `${view} of ${picture.name}`;
    image.src = picture[view];
    return image;
  }
  function watch(image, picture) {
    if (!(image instanceof HTMLImageElement)) return;
    const ready = () => image.isConnected && place(image, picture); // another picture may have been chosen meanwhile
    image.addEventListener("load", ready);
    image.addEventListener("error", () => image.replaceWith(placeholder()));
    if (image.complete) image.naturalWidth ? ready() : image.replaceWith(placeholder());
  }
  // A shown picture may be a reduced one; the map has as many pixels as were compared.
  function place(image, picture) {
    image.closest("figure").style.setProperty("--ratio", image.naturalWidth / image.naturalHeight);
    const map = stage.querySelector("[data-view=heat] img");
    if (!picture.region || !map || !map.naturalWidth) return;
    const [row, column, height, width] = picture.region, { naturalWidth: w, naturalHeight: h } = map;
    for (const each of stage.querySelectorAll(".region")) {
      Object.assign(each.style, { left: `${(column / w) * 100}%`, top: `${(row / h) * 100}%`, width: `${(width / w) * 100}%`, height: `${(height / h) * 100}%` });
      each.hidden = !region.checked;
    }
  }

  function choose(index, focus) {
    current = Math.min(Math.max(index, 0), pictures.length - 1);
    const picture = pictures[current];
    byId("picture-name").textContent = picture.name;
    byId("picture-summary").textContent = picture.summary;
    byId("picture-count").textContent = `${current + 1} of ${pictures.length}`;
    const images = figures.map((figure) => {
      const view = figure.dataset.view, frame = figure.querySelector(".frame"), outline = frame.querySelector(".region");
      figure.hidden = !picture.made.includes(view);
      Object.assign(outline, { hidden: true }).style.width = "";
      const image = shown(picture, view);
      frame.replaceChildren(image, outline);
      return image;
    });
    for (const image of images) watch(image, picture);
    buttons.forEach((button, i) => {
      button.setAttribute("aria-pressed", i === current);
      button.tabIndex = i === current ? 0 : -1;
    });
    if (focus) buttons[current].focus();
  }

  function setMode(mode) {
    viewer.dataset.mode = mode;
    for (const button of section.querySelectorAll(".modes button"))
      button.setAttribute("aria-pressed", button.dataset.mode === mode);
    if (mode === "blink") auto.checked = !matchMedia("(prefers-reduced-motion: reduce)").matches;
    blink();
  }
  function blink() {
    clearInterval(timer);
    show("reference");
    if (viewer.dataset.mode === "blink" && auto.checked) timer = setInterval(flip, 600);
  }
  function show(side) {
    stage.dataset.shown = side;
    byId("picture-shown").textContent = side;
  }
  const flip = () => show(stage.dataset.shown === "reference" ? "candidate" : "reference");
  function flipByHand() {
    auto.checked = false;
    clearInterval(timer);
    flip();
  }
  function setSplit(value) {
    split.value = value;
    stage.style.setProperty("--split", `${split.value}%`);
  }
  function outline() {
    for (const each of stage.querySelectorAll(".region")) each.hidden = !region.checked || !pictures[current].region || !each.style.width;
  }

  section.addEventListener("click", (event) => {
    const { picture, go, mode } = event.target.closest("button")?.dataset ?? {};
    if (picture !== undefined) {
      choose(Number(picture));
      viewer.scrollIntoView({ block: "nearest" });
    } else if (go !== undefined) choose(current + Number(go));
    else if (mode !== undefined) setMode(mode);
  });
  byId("picture-flip").addEventListener("click", flipByHand);
  auto.addEventListener("change", blink);
  region.addEventListener("change", outline);
  split.addEventListener("input", () => setSplit(split.value));
  stage.addEventListener("pointermove", (event) => {
    const frame = stage.querySelector("[data-view=reference] .frame").getBoundingClientRect();
    if (viewer.dataset.mode === "slider" && (event.buttons || event.pointerType === "mouse"))
      setSplit(((event.clientX - frame.left) / frame.width) * 100);
  });
  section.addEventListener("keydown", (event) => {
    if (event.target.matches("input:not([type=checkbox])") || event.altKey || event.ctrlKey || event.metaKey) return;
    const inList = event.target.dataset.picture !== undefined, visible = (step) => {
      let index = current + step;
      while (inList && buttons[index]?.parentElement.hidden) index += step;
      return buttons[index] ? index : current;
    };
    const to = { ArrowRight: visible(1), ArrowLeft: visible(-1), Home: 0, End: pictures.length - 1 }[event.key];
    if (to !== undefined) choose(to, inList);
    else if (modes[Number(event.key) - 1]) setMode(modes[Number(event.key) - 1]);
    else if (event.key === "," || event.key === ".") setSplit(Number(split.value) + (event.key === "." ? 5 : -5));
    else if (event.key === "f") flipByHand();
    else if (event.key === "r") {
      region.checked = !region.checked;
      outline();
    } else return;
    event.preventDefault();
  });
  // A thumbnail that is missing, although it was there when the page was made.
  section.addEventListener("error", (event) => event.target.matches?.(".thumbnails img") && event.target.replaceWith(placeholder()), true);
  setSplit(50);
  for (const figure of figures) watch(figure.querySelector(".frame").firstElementChild, pictures[0]);
})();
