// Hides the questions that do not match the filters. Without it, the page shows all of them.
"use strict";
{
  const form = document.getElementById("filters");
  const matching = document.getElementById("matching");
  const questions = [...document.querySelectorAll(".question")].map((element) => ({
    element,
    kind: element.dataset.type,
    text: element.textContent.toLowerCase(),
    answers: [...element.querySelectorAll(".reply")],
  }));
  const entries = [...document.querySelectorAll(".entry")];

  function apply() {
    const chosen = Object.fromEntries(new FormData(form));
    const words = (chosen.text || "").toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const question of questions) {
      const shown = question.answers.filter((answer) => !chosen.arm || answer.dataset.arm === chosen.arm);
      for (const answer of question.answers) answer.hidden = !shown.includes(answer);
      const fits = (answer) =>
        (!chosen.outcome || answer.dataset.outcome.split(" ").includes(chosen.outcome)) &&
        (!chosen.called || (chosen.called === "any" ? answer.dataset.called !== "=" :
          answer.dataset.called === chosen.called));
      const matches = (!chosen.type || question.kind === chosen.type) && shown.some(fits) &&
        words.every((word) => question.text.includes(word));
      question.element.hidden = !matches;
      count += matches;
    }
    for (const entry of entries) entry.hidden = !entry.querySelector(".question:not([hidden])");
    matching.textContent = count === questions.length ? "" : `${count} of ${questions.length} match`;
  }

  form.hidden = false;
  form.addEventListener("input", apply);
  form.addEventListener("reset", () => setTimeout(apply));
  form.addEventListener("submit", (event) => event.preventDefault());
  apply();
}
