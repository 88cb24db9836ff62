// What the page does by itself: buttons post without leaving it, and what is [data-live] is kept up to date.
"use strict";

const said = document.getElementById("said");
const asked = new Map(); // id of a live part → when it was asked for last, milliseconds
const SHOWN = 12000; // milliseconds that a message stays; one about trouble stays until it is closed
const MOST = 3; // messages at once
const AGAIN = 3; // times that a picture is asked for again
const missed = new WeakMap(); // picture → how often it did not come
let sent = 0, applied = 0; // numbers of the states of the page that were asked for, and of the newest that was shown
let failures = 0;

/** Say something to everybody, screen readers too. */
function say(text, bad = false) {
  const line = document.createElement("p");
  line.textContent = text;
  if (bad) {
    const close = document.createElement("button");
    Object.assign(close, { type: "button", className: "quiet", textContent: "Close", onclick: () => line.remove() });
    line.className = "bad";
    line.append(" ", close);
  }
  said.append(line);
  while (said.children.length > MOST) said.firstElementChild.remove();
  if (!bad) setTimeout(() => line.remove(), SHOWN);
  return line;
}

/** Post a form to its JSON route, then show how things stand. */
async function post(form) {
  const button = form.querySelector("button");
  if (button.getAttribute("aria-busy")) return; // pressed twice
  const body = JSON.parse(form.dataset.body);
  for (const box of form.querySelectorAll("input[type=checkbox]")) body[box.name] = box.checked;
  button.setAttribute("aria-busy", "true");
  try {
    const answer = await fetch(form.action, {
      method: "POST", headers: { "Content-Type": "application/json", Accept: "application/json" }, body: JSON.stringify(body),
    });
    const told = await answer.json();
    said.replaceChildren(); // what was said of earlier deeds may hold no more
    say(told.error ? told.error.message : told.message || "Done.", Boolean(told.error));
  } catch (error) {
    say(`The backend did not answer (${error.message}). Is it running?`, true);
  }
  button.removeAttribute("aria-busy");
  await refresh().catch(() => {}); // what is shown stays; the next turn tries again
}

// ---------------------------------------------------------------- one state of the page after another

const KEPT = ["open", "tabindex", "aria-busy"]; // what a person, or this script, did to an element

/** What tells an element from its siblings, in every state of the page: its id; of a form, what its button does, and says that it does. */
function key(node) {
  if (node.id || node.nodeName !== "FORM") return node.id || "";
  return [node.getAttribute("action"), node.dataset.body, node.querySelector("button")?.getAttribute("aria-label")].join();
}

/** What `child` was in the state before: the same key, else the same kind of element that is not passed by anything with a key. */
function counterpart(child, from) {
  const like = (node) => node.nodeName === child.nodeName && key(node) === key(child);
  if (child.nodeType === Node.TEXT_NODE) return from && like(from) ? from : null;
  for (let node = from; node; node = node.nextSibling) {
    if (like(node)) return node;
    if (!key(child) && key(node)) return null;
  }
  return null;
}

/**
 * Make `old` what `fresh` is, and touch only what differs. Elements that stay are the same ones: a button that is being
 * clicked, the keyboard's place, a selection, an opened <details> and how far something was scrolled outlast it.
 */
function patch(old, fresh) {
  if (old.isEqualNode(fresh)) return;
  if (old.nodeType === Node.TEXT_NODE) {
    old.data = fresh.data;
    return;
  }
  for (const { name } of [...old.attributes]) if (!fresh.hasAttribute(name) && !KEPT.includes(name)) old.removeAttribute(name);
  for (const { name, value } of fresh.attributes) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  const keys = new Set([...fresh.children].map(key));
  for (const child of [...old.children]) if (!keys.has(key(child)) && key(child)) child.remove();
  let at = old.firstChild;
  const next = () => { const gone = at; at = at.nextSibling; return gone; };
  for (const child of [...fresh.childNodes]) {
    const same = counterpart(child, at);
    while (same && at !== same && !key(at)) next().remove();
    if (at !== same || !same) old.insertBefore(same || child, at);
    else next();
    if (same) patch(same, child);
  }
  while (at) next().remove();
}

/** Where the keyboard goes when what it is on vanishes: the next entry of the same list, else what surrounded it. Never to another button. */
function nearby(element, part) {
  const places = [];
  for (let at = element; at !== part; at = at.parentElement) {
    if (at.matches("li")) places.push(at, at.nextElementSibling, at.previousElementSibling);
    if (at.matches("section")) places.push(at);
  }
  return [...places, part].filter(Boolean);
}

/** A live part becomes what it is in the next state of the page; what is new in it and [data-announce] is said. */
function exchange(part, fresh) {
  own(fresh); // both are to be in the reader's own words, or they would always differ
  const words = () => [...part.querySelectorAll("[data-announce]")].map((e) => e.textContent.trim().replace(/\s+/g, " "));
  const focused = document.activeElement;
  const places = part.contains(focused) ? nearby(focused, part) : [];
  const before = words();
  patch(part, fresh);
  if (places.length && !focused.isConnected) {
    const place = places.find((e) => e.isConnected);
    place.tabIndex = -1;
    place.focus({ preventScroll: true });
  }
  const news = words().filter((text) => !before.includes(text));
  if (news.length && before.length) say(news.join(" "));
}

/** The page as it is now; null when a newer state is shown already. */
async function page(url) {
  const number = ++sent;
  const answer = await fetch(url, { headers: { Accept: "text/html" } });
  if (!answer.ok) throw new Error(`status ${answer.status}`);
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
  if (number < applied) return null;
  applied = number;
  return fresh;
}

/** All live parts of this page, as they are now. */
async function refresh() {
  const fresh = await page(location.href);
  for (const part of document.querySelectorAll("[data-live]")) {
    const found = fresh?.getElementById(part.id);
    if (found) exchange(part, document.adoptNode(found));
  }
}

/** One live part that has an address of its own. When it tells of another state, all other parts are asked for, too. */
async function renew(part) {
  const fresh = (await page(part.dataset.url))?.getElementById(part.id);
  if (!fresh) return;
  const changed = fresh.dataset.state !== part.dataset.state;
  exchange(part, document.adoptNode(fresh));
  if (changed) await refresh();
}

async function turn() {
  for (const part of document.hidden ? [] : document.querySelectorAll("[data-live][data-every]")) {
    if (!asked.has(part.id)) asked.set(part.id, Date.now());
    if (Date.now() < asked.get(part.id) + 1000 * part.dataset.every) continue;
    asked.set(part.id, Date.now());
    try {
      await (part.dataset.url ? renew(part) : refresh());
      failures = 0;
      document.getElementById("lost")?.remove();
    } catch { // once is nothing: the next turn tries again
      failures += 1;
      if (failures === 2) say("The backend does not answer; what is shown here may be old.", true).id = "lost";
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

// A picture that did not come, since too many were asked for at once, is asked for again.
document.addEventListener("error", ({ target }) => {
  const address = { IMG: "src", image: "href" }[target.nodeName];
  const times = (missed.get(target) || 0) + 1;
  if (!address || times > AGAIN) return;
  missed.set(target, times);
  setTimeout(() => target.setAttribute(address, target.getAttribute(address)), 3000 * times);
}, true);

document.addEventListener("submit", (event) => {
  if (event.target.matches("form[data-body]")) {
    event.preventDefault();
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
