// @ts-check
// Colours of experts and depths of shading, as rules of a style sheet.

const SHADES = 24; // depths of a token's ground: classes, since a style of its own a token is slow to compute

/** Class name of a ground as deep as `share`, from 0 to 1, in the colour of --tint. */
export const shadeLook = (share) => ` w${Math.round((SHADES - 1) * Math.max(0, Math.min(1, share)))}`;

export function shadeRules() {
  return Array.from({ length: SHADES }, (_, level) => {
    const depth = 4 + (38 * level) / (SHADES - 1); // text stays readable on the deepest
    return `.w${level}{background-color:color-mix(in srgb,var(--tint) ${depth.toFixed(1)}%,transparent)}`;
  }).join("");
}

/** Rules for experts. A token's are without variables and its digit is a picture: then a step costs no layout. */
export function expertRules(colours) {
  const width = 7 * String(colours.length - 1).length;
  return colours.map((colour, e) =>
    `.e${e}:not(.t){--first:${colour};--ink:${inkOn(colour)}}.s${e}:not(.t){--second:${colour}}` +
    `.t.e${e}{border-bottom-color:${colour}}.t.s${e}{box-shadow:0 1px 0 var(--ground),0 3px 0 ${colour}}` +
    `.digits .e${e}{background-image:${digitPicture(e, width, "#1b1b1f")}}` +
    `@media screen{[data-theme=dark] .digits .e${e}{background-image:${digitPicture(e, width, "#e8e8ee")}}}`).join("") +
    `.digits .t{padding-right:${width}px;background-size:auto 11px}`;
}

function digitPicture(expert, width, colour) {
  const svg = `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="11" viewBox="0 0 ${width} 11">` +
    `<text x="1" y="10" font-family="system-ui, sans-serif" font-size="10.5" fill="${colour}">${expert}</text></svg>`;
  return `url("data:image/svg+xml,${encodeURIComponent(svg)}")`;
}

function inkOn(colour) {
  const linear = [1, 3, 5].map((i) => (parseInt(colour.slice(i, i + 2), 16) / 255) ** 2.2);
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] > 0.18 ? "#000" : "#fff";
}
