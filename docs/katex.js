// Formulas that pymdownx.arithmatex has marked with \( \) and \[ \].
const delimiters = [
  { left: "\\(", right: "\\)", display: false },
  { left: "\\[", right: "\\]", display: true },
];
document.querySelectorAll(".arithmatex").forEach((formula) => renderMathInElement(formula, { delimiters }));
