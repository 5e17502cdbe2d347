// Builds the page of a model that is no run. Loaded last.
function build() {
  document.getElementById('root').innerHTML = lineageSection(D.lineage) + (D.scores ? scoresSection(D.scores) : '');
}
build();
