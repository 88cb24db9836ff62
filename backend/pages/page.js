// What the page does by itself: buttons post without leaving it, and what is [data-live] is kept up to date.
"use strict";

const said = document.getElementById("said");
const asked = new Map(); // id of a live part → when it is asked for next, milliseconds

/** Say something to everybody, screen readers too. */
function say(text, bad = false) {
  const line = document.createElement("p");
  line.textContent = text;
  if (bad) line.className = "bad";
  said.replaceChildren(line);
  if (!bad) setTimeout(() => line.remove(), 12000);
}

/** Post a form to its JSON route, then show how things stand. */
async function post(form) {
  const button = form.querySelector("button");
  const body = JSON.parse(form.dataset.body);
  for (const box of form.querySelectorAll("input[type=checkbox]")) body[box.name] = box.checked;
  button.setAttribute("aria-busy", "true");
  try {
    const answer = await fetch(form.action, {
      method: "POST", headers: { "Content-Type": "application/json", Accept: "application/json" }, body: JSON.stringify(body),
    });
    const told = await answer.json();
    say(told.error ? told.error.message : told.message || "Done.", Boolean(told.error));
  } catch (error) {
    say(`The backend did not answer (${error.message}). Is it running?`, true);
  }
  button.removeAttribute("aria-busy");
  await refresh();
}

/** The same part of another state of the page takes its place; the keyboard stays where it was, what was opened stays open. */
function exchange(old, fresh) {
  own(fresh); // both are to be in the reader's own words, or they would always differ
  if (old.isEqualNode(fresh)) return;
  const focused = old.contains(document.activeElement) ? document.activeElement : null;
  const open = [...old.querySelectorAll("details")].map((d) => d.open);
  const words = (part) => [...part.querySelectorAll("[data-announce]")].map((e) => e.textContent.trim().replace(/\s+/g, " "));
  const before = words(old);
  const news = words(fresh).filter((text) => !before.includes(text));
  const boxes = [...old.querySelectorAll("input[type=checkbox]")].filter((box) => box.checked).map((box) => box.id);
  old.replaceWith(fresh);
  [...fresh.querySelectorAll("details")].forEach((d, i) => { d.open = Boolean(open[i]); });
  for (const id of boxes) { const box = document.getElementById(id); if (box) box.checked = true; }
  if (focused) (focused.id && document.getElementById(focused.id) || fresh.querySelector("button:enabled, a") || document.getElementById("main")).focus({ preventScroll: true });
  if (news.length && before.length) say(news.join(" "));
}

async function page(url) {
  const answer = await fetch(url, { headers: { Accept: "text/html" } });
  if (!answer.ok) throw new Error(`status ${answer.status}`);
  return new DOMParser().parseFromString(await answer.text(), "text/html");
}

/** All live parts of this page, as they are now. */
async function refresh() {
  try {
    const fresh = await page(location.href);
    for (const old of document.querySelectorAll("[data-live]")) {
      const found = fresh.getElementById(old.id);
      if (found) exchange(old, document.adoptNode(found));
    }
  } catch { /* the next turn tries again; what is shown stays */ }
}

/** One live part that has an address of its own. When it tells of another state, all other parts are asked for, too. */
async function renew(part) {
  try {
    const fresh = (await page(part.dataset.url)).getElementById(part.id);
    const changed = fresh.dataset.state !== part.dataset.state;
    exchange(part, document.adoptNode(fresh));
    if (changed) await refresh();
  } catch { /* as above */ }
}

async function turn() {
  if (!document.hidden) {
    for (const part of document.querySelectorAll("[data-live][data-every]")) {
      if (!asked.has(part.id)) asked.set(part.id, Date.now() + 1000 * part.dataset.every);
      if (Date.now() < asked.get(part.id)) continue;
      await (part.dataset.url ? renew(part) : refresh());
      const now = document.getElementById(part.id);
      asked.set(part.id, Date.now() + 1000 * (now?.dataset.every || 60));
    }
  }
  setTimeout(turn, 500);
}

/** Times as the reader writes them. */
function own(root) {
  for (const time of root.querySelectorAll("time")) {
    time.textContent = new Date(time.dateTime).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
  }
}

document.addEventListener("submit", (event) => {
  if (event.target.matches("form[data-body]")) {
    event.preventDefault();
    asked.clear();
    post(event.target);
  }
});

document.addEventListener("click", async (event) => {
  const button = event.target.closest("button[data-copy]");
  if (!button) return;
  const source = document.getElementById(button.dataset.copy);
  getSelection().selectAllChildren(source);
  try {
    await navigator.clipboard.writeText(source.textContent);
    say("The command is copied.");
  } catch { // no clipboard without HTTPS: what is selected can be copied by hand
    say("The command is selected; copy it with Ctrl+C.");
  }
});

own(document);
turn();
