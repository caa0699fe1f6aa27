// The report's own script: theme, sorting and filtering of the table, charts and 3D views. It loads nothing.
"use strict";
(() => {
  const root = document.documentElement;
  const byId = (id) => document.getElementById(id);
  const data = (id) => JSON.parse(byId(id).textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const print = window.matchMedia("print");

  // Theme: what the system prefers, until the button is pressed.
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : dark.matches);
  byId("theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    drawAll();
  });
  dark.addEventListener("change", () => drawAll());

  // Table: a click or Enter on a heading sorts; rows without a value stay last.
  const table = byId("records");
  if (table) {
    const body = table.tBodies[0];
    const heads = [...table.tHead.rows[0].cells];
    const key = (row, column) => row.cells[column].dataset.sort;
    const order = (first, second, sign) => {
      if (first === undefined || second === undefined) return (first === undefined) - (second === undefined);
      const numbers = [Number(first), Number(second)];
      const both = first !== "" && second !== "" && numbers.every(Number.isFinite);
      return sign * (both ? numbers[0] - numbers[1] : first.localeCompare(second, undefined, { numeric: true }));
    };
    heads.forEach((head, column) => {
      head.firstElementChild.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        heads.forEach((other) => other.setAttribute("aria-sort", "none"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const rows = [...body.rows].sort((a, b) => order(key(a, column), key(b, column), down ? -1 : 1));
        body.append(...rows);
      });
    });
    const form = byId("filters");
    const choices = [...form.querySelectorAll("select")];
    const filter = () => {
      const words = byId("words").value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const row of body.rows) {
        const text = row.textContent.toLowerCase();
        const fits =
          words.every((word) => text.includes(word)) &&
          choices.every((choice) => choice.value === "" || row.dataset[choice.dataset.key] === choice.value);
        row.hidden = !fits;
        shown += fits;
      }
      const output = byId("shown");
      output.textContent = output.dataset.text.replace("{0}", shown).replace("{1}", body.rows.length);
    };
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("input", filter);
    form.addEventListener("change", filter);
    byId("words").addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        byId("words").value = "";
        filter();
      }
    });
    filter();
  }

  // Charts: colours that begin with "@" are those of the theme.
  const colour = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();
  const themed = (value) => {
    if (typeof value === "string") return /^@[a-z]+$/.test(value) ? colour(value.slice(1)) : value;
    if (Array.isArray(value)) return value.map(themed);
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([name, item]) => [name, themed(item)]));
  };
  const config = { displayModeBar: false, responsive: true };
  const font = () => ({ color: colour("text"), family: getComputedStyle(document.body).fontFamily, size: 12 });
  const axis = (own) => ({
    gridcolor: colour("grid"),
    linecolor: colour("line"),
    zerolinecolor: colour("line"),
    exponentformat: "none",
    automargin: true,
    ...own,
    title: { standoff: 14, ...own.title },
  });
  const figures = data("figures");
  const draw = (figure) => {
    const place = byId(figure.id);
    const layout = themed(figure.layout);
    return Plotly.react(
      place,
      themed(figure.data),
      {
        showlegend: false,
        ...layout,
        height: Number(place.dataset.height),
        margin: { l: 60, r: 20, t: 30, b: 55 },
        paper_bgcolor: "rgba(0,0,0,0)",
        plot_bgcolor: "rgba(0,0,0,0)",
        font: font(),
        hoverlabel: { font: { family: font().family } },
        xaxis: axis(layout.xaxis),
        yaxis: axis(layout.yaxis),
      },
      config,
    );
  };

  // Point maps: two views, one camera; x right, y down, z forward.
  const decoded = (text, kind) => new kind(Uint8Array.from(atob(text), (sign) => sign.charCodeAt(0)).buffer);
  const scenes = data("scenes").map((scene) => ({
    ...scene,
    sides: scene.sides.map((side) => {
      const points = decoded(side.points, Float32Array);
      const rgb = decoded(side.colours, Uint8Array);
      const count = points.length / 3;
      const pick = (offset) => Float32Array.from({ length: count }, (_, at) => points[3 * at + offset]);
      return {
        label: side.label,
        xyz: [pick(0), pick(1), pick(2)],
        image: Array.from({ length: count }, (_, at) => `rgb(${rgb[3 * at]},${rgb[3 * at + 1]},${rgb[3 * at + 2]})`),
        error: decoded(side.error, Float32Array),
      };
    }),
    camera: { eye: { x: 0.3, y: -0.5, z: -1.75 }, up: { x: 0, y: -1, z: 0 }, center: { x: 0, y: 0, z: 0 } },
  }));
  const sizes = (ranges) => {
    const spans = ranges.map(([low, high]) => high - low);
    const most = Math.max(...spans);
    return { x: spans[0] / most, y: spans[1] / most, z: spans[2] / most };
  };
  const drawScene = (scene) => {
    const place = byId(scene.id);
    const byError = document.querySelector(`input[name="${scene.id}"]:checked`).value === "error";
    const own = (number) => ({
      type: "scatter3d",
      mode: "markers",
      name: scene.sides[number].label,
      scene: number ? "scene2" : "scene",
      x: scene.sides[number].xyz[0],
      y: scene.sides[number].xyz[1],
      z: scene.sides[number].xyz[2],
      hoverinfo: "skip",
      marker: {
        size: 1.8,
        opacity: 1,
        color: byError ? scene.sides[number].error : scene.sides[number].image,
        ...(byError ? { colorscale: scene.colorscale, cmin: 0, cmax: scene.most } : {}),
      },
    });
    const side = (range, title) => ({
      range,
      title: { text: title },
      color: colour("muted"),
      gridcolor: colour("grid"),
      showbackground: false,
      exponentformat: "none",
      nticks: 5,
    });
    const view = (domain) => ({
      domain: { x: domain },
      camera: scene.camera,
      aspectmode: "manual",
      aspectratio: sizes(scene.ranges),
      xaxis: side(scene.ranges[0], "x"),
      yaxis: side(scene.ranges[1], "y"),
      zaxis: side(scene.ranges[2], "z"),
      dragmode: "orbit",
    });
    const layout = {
      showlegend: false,
      margin: { l: 0, r: 0, t: 0, b: 0 },
      paper_bgcolor: "rgba(0,0,0,0)",
      font: font(),
      scene: view([0, 0.495]),
      scene2: view([0.505, 1]),
    };
    return Plotly.react(place, [own(0), own(1)], layout, { displayModeBar: false, responsive: true });
  };
  const still = async (scene) => {
    // What WebGL draws is not printed: a picture of it stands in.
    const place = byId(scene.id);
    const address = await Plotly.toImage(place, { format: "png", width: 1100, height: 520 });
    let image = place.parentElement.querySelector("img.still");
    if (!image) {
      image = document.createElement("img");
      image.className = "still";
      image.alt = "";
      place.after(image);
    }
    image.src = address;
    place.classList.add("has-still");
  };
  const follow = (scene) => {
    const place = byId(scene.id);
    let busy = false;
    const together = async (change) => {
      const camera = change["scene.camera"] ?? change["scene2.camera"];
      if (busy || !camera) return;
      busy = true;
      scene.camera = camera;
      await Plotly.relayout(place, change["scene.camera"] ? { "scene2.camera": camera } : { "scene.camera": camera });
      busy = false;
    };
    place.on("plotly_relayouting", together);
    place.on("plotly_relayout", async (change) => {
      await together(change);
      still(scene);
    });
    document.querySelectorAll(`input[name="${scene.id}"]`).forEach((choice) =>
      choice.addEventListener("change", async () => {
        await drawScene(scene);
        still(scene);
      }),
    );
  };

  const drawAll = () => Promise.all([...figures.map(draw), ...scenes.map(drawScene)]);
  const paper = () => figures.map(draw) && figures.forEach((figure) => Plotly.Plots.resize(byId(figure.id)));
  print.addEventListener("change", paper);
  drawAll().then(async () => {
    scenes.forEach(follow);
    root.dataset.ready = "yes";
    for (const scene of scenes) await still(scene);
    root.dataset.printable = "yes";
  });
})();
