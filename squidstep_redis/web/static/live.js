// Keeps the live region of a page up to date. The page works without it.
"use strict";
(() => {
  const region = document.getElementById("live");
  const note = document.getElementById("live-note");
  const said = document.getElementById("live-said");
  const button = document.getElementById("live-button");
  if (!region || !("EventSource" in window)) return;

  const RETRY_MS = 2000;
  let known = new URL(region.dataset.events, location.href).searchParams.get("known");
  let source = null;
  let paused = false;
  let loading = false;
  let pending = false;
  let timer = 0;
  let lost = 0;

  const say = (text) => { if (note.textContent !== text) note.textContent = text; };

  // What must survive a replacement: the focus, what was typed, and which details are open.
  const keyOf = (element) => [
    element.tagName, element.id, element.getAttribute("href"), element.getAttribute("name"),
    element.form ? element.form.getAttribute("action") : "",
    element.closest("details") ? element.closest("details").id : "",
  ].join("|");

  const replace = (html) => {
    const next = new DOMParser().parseFromString(html, "text/html").body;
    const focused = region.contains(document.activeElement) ? keyOf(document.activeElement) : null;
    for (const details of region.querySelectorAll("details[open][id]")) {
      const other = next.querySelector("#" + CSS.escape(details.id));
      if (other) other.open = true;
    }
    const typed = new Map();
    for (const input of region.querySelectorAll("input:not([type=hidden])")) typed.set(keyOf(input), input.value);
    const summary = (root) => (root.querySelector("#live-summary") || { textContent: "" }).textContent;
    const before = summary(region);
    // Sections that have not changed stay as they are, so that a screen reader keeps its place in them.
    const parts = [...next.children].map((part) => {
      const old = part.id ? region.querySelector("#" + CSS.escape(part.id)) : null;
      return old && old.isEqualNode(part) ? old : document.importNode(part, true);
    });
    if (parts.length !== region.children.length || parts.some((part, index) => part !== region.children[index])) {
      region.replaceChildren(...parts);
    }
    for (const input of region.querySelectorAll("input:not([type=hidden])")) {
      const value = typed.get(keyOf(input));
      if (value !== undefined) input.value = value;
    }
    if (focused !== null && !region.contains(document.activeElement)) {
      for (const element of region.querySelectorAll("a, button, input, summary, select")) {
        if (keyOf(element) === focused) { element.focus({ preventScroll: true }); break; }
      }
    }
    const after = summary(region);
    if (after !== before) said.textContent = "Updated: " + after;
  };

  const isSelecting = () => {
    const selection = document.getSelection();
    return selection && !selection.isCollapsed && region.contains(selection.anchorNode);
  };

  const later = () => { clearTimeout(timer); timer = setTimeout(load, RETRY_MS); };

  const load = async () => {
    if (paused) return;
    if (loading) { pending = true; return; }
    if (isSelecting()) { later(); return; }
    loading = true;
    try {
      const options = { cache: "no-store", credentials: "same-origin", redirect: "manual" };
      const response = await fetch(region.dataset.fragment, options);
      if (response.type === "opaqueredirect" || response.status === 401 || response.status === 403) {
        close();
        say("This page is not up to date: you are no longer allowed to see it. Reload it.");
      } else if (response.ok) {
        replace(await response.text());
        say("This page updates itself.");
      } else {
        say("This page is not up to date: the server responded with status " + response.status + ". Trying again…");
        later();
      }
    } catch {
      say("This page is not up to date: the server does not respond. Trying again…");
      later();
    }
    loading = false;
    if (pending) { pending = false; load(); }
  };

  const found = () => { clearTimeout(lost); lost = 0; };

  const open = () => {
    if (source || paused || document.hidden) return;
    const address = new URL(region.dataset.events, location.href);
    address.searchParams.set("known", known);
    source = new EventSource(address);
    source.onopen = () => { found(); say("This page updates itself."); };
    source.addEventListener("change", (event) => { known = event.data; load(); });
    source.onerror = () => {
      // A stream ends regularly, and the browser opens the next one at once.
      lost ||= setTimeout(() => say("This page is not up to date: the connection is lost. Trying again…"), RETRY_MS);
      if (source && source.readyState === EventSource.CLOSED) {
        found();
        say("This page does not update itself at the moment. Reload it to see changes.");
        source = null;
        setTimeout(open, 10 * RETRY_MS);
      }
    };
  };

  const close = () => { found(); if (source) { source.close(); source = null; } };

  button.hidden = false;
  button.addEventListener("click", () => {
    paused = !paused;
    button.textContent = paused ? "Resume updates" : "Pause updates";
    if (paused) { close(); say("Updates are paused."); } else { open(); load(); }
  });
  document.addEventListener("visibilitychange", () => (document.hidden ? close() : open()));
  window.addEventListener("pagehide", close);
  window.addEventListener("pageshow", open);
  open();
})();
