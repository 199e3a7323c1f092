// The scores of Sphinx, with tutorials before other pages that match alike.
var Scorer = {
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
  score: ([docname, , , , score]) =>
    docname.startsWith("tutorials/") ? score + 5 : score,
};
