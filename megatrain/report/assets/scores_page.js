function build() {
  document.getElementById('root').innerHTML = scoresSection(D.scores);
}
build();
