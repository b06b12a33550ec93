// Numbers for people. What is not known is a dash.

const NONE = "–";
const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

/** Bytes in binary units: "1.5 MiB". */
export function bytes(count) {
  if (count === null || count === undefined) return NONE;
  let value = Math.abs(count);
  let unit = 0;
  while (value >= 1024 && unit < UNITS.length - 1) {
    value /= 1024;
    unit += 1;
  }
  const sign = count < 0 ? "−" : "";
  return `${sign}${value.toFixed(unit > 0 && value < 100 ? 1 : 0)} ${UNITS[unit]}`;
}

/** A span of seconds: "0.4 ms", "85 ms", "1.25 s". */
export function duration(seconds) {
  if (seconds === null || seconds === undefined) return NONE;
  if (seconds < 0.01) return `${(seconds * 1000).toFixed(1)} ms`;
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  return `${seconds.toFixed(seconds < 10 ? 2 : 1)} s`;
}

/** A long time: "42 s", "3 min", "5 h 20 min", "2 d 4 h". */
export function uptime(seconds) {
  const minutes = Math.floor(seconds / 60);
  const hours = Math.floor(minutes / 60);
  const days = Math.floor(hours / 24);
  if (minutes < 1) return `${seconds} s`;
  if (hours < 1) return `${minutes} min`;
  if (days < 1) return `${hours} h ${minutes % 60} min`;
  return `${days} d ${hours % 24} h`;
}

/** A whole number with separators: "12,345". */
export function count(value) {
  return value === null || value === undefined ? NONE : Math.round(value).toLocaleString("en");
}

/** Tokens a second: "0", "8.3", "1,250". */
export function rate(value) {
  if (value === null || value === undefined) return NONE;
  return value > 0 && value < 100 ? value.toFixed(1) : count(value);
}

/** A share of one: "98.5 %". */
export function percent(share) {
  return share === null || share === undefined ? NONE : `${(share * 100).toFixed(1)} %`;
}

/** What a head group keeps, in words. */
export function keeps(group) {
  if (group.window_size === null) return "keeps every token";
  const window = `the last ${count(group.window_size)} tokens`;
  return group.sink_size > 0
    ? `keeps the first ${count(group.sink_size)} and ${window}`
    : `keeps ${window}`;
}
