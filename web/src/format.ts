// Numbers, days and names as people read them. Pure.
import type { Acquisition, Label, LonLatBox, Mosaic } from './types'

const MINUS = '−'

export function formatCount(n: number): string { return n.toLocaleString('en-GB') }
export function plural(n: number, word: string): string {
  const many = /(s|x|ch|sh)$/.test(word) ? `${word}es` : /[^aeiou]y$/.test(word) ? `${word.slice(0, -1)}ies` : `${word}s`
  return `${formatCount(n)} ${n === 1 ? word : many}`
}
export function formatShare(x: number): string { return `${Math.round(x * 100)} %` }
export function formatDegrees(x: number): string { return `${x.toFixed(Number.isInteger(x) ? 0 : 1)}°` }
export function formatScore(x: number): string { return x.toFixed(3).replace('-', MINUS) }

/** Write a day as 22 Aug 2021, in English and whatever zone the reader is in. */
export function formatDay(day: string | null | undefined): string {
  const d = day ? new Date(`${day.slice(0, 10)}T00:00:00Z`) : null
  if (!d || Number.isNaN(d.getTime())) return 'unknown date'
  return `${d.getUTCDate()} ${['Jan', 'Feb', 'Mar', 'Apr', 'May', 'Jun', 'Jul', 'Aug', 'Sep', 'Oct', 'Nov', 'Dec'][d.getUTCMonth()]} ${d.getUTCFullYear()}`
}

export function formatPosition(lon: number, lat: number): string {
  const part = (x: number, plus: string, minus: string): string => `${Math.abs(x).toFixed(5)}° ${x < 0 ? minus : plus}`
  return `${part(lat, 'N', 'S')}, ${part(lon, 'E', 'W')}`
}

/** Say how much of a class was mapped at a place. */
export function formatMeasure(l: Pick<Label, 'measure' | 'unit'>): string {
  if (l.measure === null || l.measure === undefined || Number.isNaN(l.measure)) return ''
  if (l.unit === 'm') return `${Math.round(l.measure)} m`
  const p = l.measure * 100
  return p > 0 && p < 1 ? '< 1 %' : `${Math.round(p)} %`
}

export function formatAcquisition(a: Acquisition): string {
  const parts = [formatDay(a.date)]
  if (a.sensor) parts.push(a.sensor)
  if (typeof a.off_nadir === 'number') parts.push(`${Math.round(a.off_nadir)}° off-nadir`)
  if (typeof a.clear === 'number') parts.push(`${formatShare(a.clear)} clear`)
  return parts.join(' · ')
}

export function formatTime(ms: number): string { return ms < 1000 ? `${Math.max(1, Math.round(ms))} ms` : `${(ms / 1000).toFixed(ms < 10_000 ? 1 : 0)} s` }
export function formatBytes(n: number): string {
  return n >= 2 ** 20 ? `${Math.round(n / 2 ** 20)} MB` : n >= 1024 ? `${Math.round(n / 1024)} kB` : `${n} bytes`
}

/** Shorten a chip's name to the end of its place. */
export function shortPlace(chip: string): string {
  const [place = chip] = chip.split('_')
  const [zone = '', quadkey = ''] = place.split('-')
  return quadkey.length > 8 ? `${zone}-…${quadkey.slice(-6)}` : place
}
export const catalogOf = (chip: string): string => chip.slice(chip.indexOf('_') + 1).replace(/\.jpg$/, '')
export const placeOf = (chip: string): string => chip.slice(0, Math.max(0, chip.indexOf('_')))

/** Tell whether a position lies in a box, which may cross the antimeridian. */
export function inBox([west, south, east, north]: LonLatBox, lon: number, lat: number): boolean {
  const x = ((lon + 540) % 360) - 180
  return lat >= south && lat <= north && (west <= east ? x >= west && x <= east : x >= west || x <= east)
}

/** List the acquisitions that a mosaic may show at a position, the one on top first where that is known. */
export function acquisitionsAt(all: readonly Acquisition[], mosaic: Mosaic, lon: number, lat: number): Acquisition[] {
  const here = all.filter((a) => (!a.bounds || inBox(a.bounds, lon, lat)) && (mosaic.mode === 'best' || (mosaic.mode === 'on' ? a.date === mosaic.date : a.date <= mosaic.date)))
  return mosaic.mode === 'best' ? here : here.toSorted((a, b) => b.date.localeCompare(a.date))
}

/** Leave out credits that others say at more length. */
export function distinctCredits(all: readonly string[]): string[] {
  const list = [...new Set(all.map((c) => c.trim()).filter(Boolean))]
  return list.filter((c) => !list.some((o) => o !== c && o.startsWith(c)))
}

/** Shorten the names of chips within a text. */
export function formatQuery(text: string): string {
  return text.replace(/Z[0-9]{2}-[0-3]+(_[A-Za-z0-9._-]+)?/g, (chip) => shortPlace(chip))
}
