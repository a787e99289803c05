"use strict";
// Data comes in as base64 of gzip and leaves as text nodes and properties; nothing here ever makes HTML of it.
const NONCE = document.currentScript.nonce;
const $ = (id) => document.getElementById(id);

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

async function inflate(id) {
  const text = atob($(id).textContent);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
}

const inflateText = async (id) => new TextDecoder().decode(await inflate(id));
const inflateJson = async (id) => JSON.parse(await inflateText(id));
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  document.dispatchEvent(new Event("theme"));
}

function openTab(name) {
  for (const tab of document.querySelectorAll("[data-tab]")) {
    tab.setAttribute("aria-selected", String(tab.dataset.tab === name));
    $(tab.dataset.tab).hidden = tab.dataset.tab !== name;
  }
  document.dispatchEvent(new CustomEvent("tab", { detail: name }));
}

function showRun(run) {
  $("name").textContent = run.name;
  $("written").textContent = `written ${run.written}`;
  for (const [title, value] of run.figures) {
    $("figures").append(element("div", {}, element("dt", { textContent: title }), element("dd", { textContent: value })));
  }
  for (const warning of run.warnings) {
    $("warnings").append(element("li", { textContent: `step ${warning.step}: ${warning.text}` }));
  }
  $("warnings").hidden = run.warnings.length === 0;
  $("config-text").textContent = run.config;
}

async function start() {
  setTheme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  $("theme").onclick = () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
  for (const tab of document.querySelectorAll("[data-tab]")) tab.onclick = () => openTab(tab.dataset.tab);
  const run = await inflateJson("run");
  showRun(run);
  await startCompletions(run.index);
  document.documentElement.dataset.shown = String(Math.round(performance.now()));
  await startCurves(run.charts);
  document.documentElement.dataset.ready = String(Math.round(performance.now()));
}

document.addEventListener("DOMContentLoaded", () => start().catch((error) => {
  $("failed").textContent = `This page cannot be shown (${error}). It needs a browser of 2023 or later.`;
  $("failed").hidden = false;
  throw error;
}));
