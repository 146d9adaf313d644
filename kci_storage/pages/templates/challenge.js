"use strict";
(async () => {
  const state = document.getElementById("state");
  const TRIED = "kci-storage-challenge"; // when a page was last loaded again, in milliseconds
  const AGAIN = 10000;

  function lastTried() {
    try {
      return Number(sessionStorage.getItem(TRIED));
    } catch {
      return 0; // the browser keeps nothing for us
    }
  }

  function note() {
    try {
      sessionStorage.setItem(TRIED, Date.now());
    } catch {
      // then the cookie is likely to be kept no better, but only trying shows that
    }
  }

  if (!navigator.cookieEnabled || Date.now() - lastTried() < AGAIN) {
    state.textContent = "Your browser does not keep the cookie that this server needs. Allow it, and load the page again.";
    return;
  }
  state.textContent = "Your browser is being checked.";
  try {
    const answer = await fetch("/v1/download-challenge", { method: "POST" });
    if (!answer.ok) throw new Error(answer.status);
  } catch {
    state.textContent = "The server cannot be reached. Load the page again in a while.";
    return;
  }
  note();
  state.textContent = "Your file comes now.";
  document.getElementById("fallback")?.remove();
  location.reload();
})();
