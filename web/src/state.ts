// The whole state of the page, and its form in a link. Pure: no page, no network.
import type { Example, Filters, LonLatBox, Mosaic, Polygon, Position, Question, State, View } from './types'

export const CHIP = /^Z[0-9]{2}-[0-3]{1,26}_[A-Za-z0-9._-]{1,80}\.jpg$/
const DAY = /^[0-9]{4}-[0-9]{2}-[0-9]{2}$/
const NAME = /^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$/
const CLASS = /^[\p{L}\p{N}_ .-]{1,64}$/u
const MOST_EXAMPLES = 200
const MOST_VERTICES = 200
export const MOST_TEXT = 2000

export const noFilters = (): Filters => ({
  since: null, until: null, zone: null, clear: null, offNadir: null, box: null, polygon: null, oneAPlace: false, otherPlace: false, where: '',
})
export const noQuestion = (): Question => ({ likes: [], unlikes: [], classes: '', verdicts: null, filters: noFilters(), k: 20 })
export const firstState = (): State => ({
  center: null, zoom: null, mosaic: { mode: 'best' }, schema: null, collection: null, chip: null, heat: null, question: noQuestion(), asked: false, view: 'search', lostPicture: false,
})

const round = (x: number, digits: number): number => Number(x.toFixed(digits))
const chipsOf = (list: Example[]): string[] => list.flatMap((e) => (e.kind === 'chip' ? [e.chip.replace(/\.jpg$/, '')] : []))

/** Write the state as what follows the # of a link. */
export function writeHash(s: State): string {
  const p: [string, string][] = []
  const put = (key: string, value: string | number | null | false): void => {
    if (value !== null && value !== '' && value !== false) p.push([key, String(value)])
  }
  if (s.center && s.zoom !== null) put('at', [round(s.center[0], 6), round(s.center[1], 6), round(s.zoom, 2)].join(','))
  if (s.mosaic.mode !== 'best') put(s.mosaic.mode, s.mosaic.date)
  put('schema', s.schema)
  put('collection', s.collection)
  put('chip', s.chip && s.chip.replace(/\.jpg$/, ''))
  put('heat', s.heat)
  const { question: q } = s
  put('like', chipsOf(q.likes).join(','))
  put('unlike', chipsOf(q.unlikes).join(','))
  put('picture', (s.lostPicture || [...q.likes, ...q.unlikes].some((e) => e.kind === 'picture')) && '1')
  put('classes', q.classes)
  if (q.verdicts) put('class' in q.verdicts ? 'verdictclass' : 'verdictquery', 'class' in q.verdicts ? q.verdicts.class : q.verdicts.query)
  put('k', q.k === 20 ? null : q.k)
  const f = q.filters
  put('since', f.since)
  put('to', f.until)
  put('zone', f.zone)
  put('clear', f.clear)
  put('offnadir', f.offNadir)
  put('box', f.box && f.box.map((x) => round(x, 6)).join(','))
  put('area', f.polygon && (f.polygon.coordinates[0] ?? []).slice(0, -1).map(([x, y]) => `${round(x, 6)} ${round(y, 6)}`).join(','))
  put('one', f.oneAPlace && '1')
  put('other', f.otherPlace && '1')
  put('where', f.where)
  put('asked', s.asked && '1')
  put('view', s.view === 'search' ? null : s.view)
  return p.map(([k, v]) => `${k}=${encodeURIComponent(v).replace(/%20/g, '+').replace(/%2C/g, ',')}`).join('&')
}

const within = (text: string | null | undefined, low: number, high: number): number | null => {
  if (text === null || text === undefined || text.trim() === '') return null
  const x = Number(text)
  return Number.isFinite(x) && x >= low && x <= high ? x : null
}
const matched = (text: string | null, form: RegExp): string | null => (text !== null && form.test(text) ? text : null)

/** Tell whether a text is a day that there is. */
export function isDay(text: string): boolean {
  if (!DAY.test(text)) return false
  const d = new Date(`${text}T00:00:00Z`)
  return !Number.isNaN(d.getTime()) && d.toISOString().startsWith(text)
}

function readBox(text: string | null): LonLatBox | null {
  const [w, s, e, n, ...more] = (text ?? '').split(',')
  const box = [within(w, -180, 180), within(s, -90, 90), within(e, -180, 180), within(n, -90, 90)]
  if (more.length || box.some((x) => x === null)) return null
  const [, south, , north] = box as LonLatBox
  return south < north ? (box as LonLatBox) : null
}

/** Close a ring of corners; null where it is none. */
export function asPolygon(corners: Position[]): Polygon | null {
  if (corners.length < 3 || corners.length > MOST_VERTICES) return null
  return { type: 'Polygon', coordinates: [[...corners, corners[0] as Position]] }
}

function readArea(text: string | null): Polygon | null {
  if (!text) return null
  const corners = text.split(',').map((pair) => {
    const [x, y, ...more] = pair.trim().split(/\s+/)
    const [lon, lat] = [within(x, -540, 540), within(y, -90, 90)]
    return more.length || lon === null || lat === null ? null : ([lon, lat] as Position)
  })
  return corners.some((c) => c === null) ? null : asPolygon(corners as Position[])
}

function readChips(text: string | null): Example[] {
  const names = (text ?? '').split(',').map((name) => `${name.trim()}.jpg`).filter((name) => CHIP.test(name))
  return [...new Set(names)].slice(0, MOST_EXAMPLES).map((chip) => ({ kind: 'chip', chip }))
}

function readMosaic(p: URLSearchParams): Mosaic {
  for (const mode of ['on', 'until'] as const) {
    const date = p.get(mode)
    if (date && isDay(date)) return { mode, date }
  }
  return { mode: 'best' }
}

/** Read what follows the # of a link; what is not understood is left out. */
export function readHash(hash: string): State {
  const p = new URLSearchParams(hash.replace(/^#/, ''))
  const s = firstState()
  const [lon, lat, zoom] = (p.get('at') ?? '').split(',')
  const at = [within(lon, -540, 540), within(lat, -90, 90), within(zoom, 0, 24)]
  if (at.every((x) => x !== null)) [s.center, s.zoom] = [[at[0], at[1]] as Position, at[2] as number]
  s.mosaic = readMosaic(p)
  s.schema = matched(p.get('schema'), NAME)
  s.collection = matched(p.get('collection'), NAME)
  s.chip = matched(p.has('chip') ? `${p.get('chip')}.jpg` : null, CHIP)
  s.heat = matched(p.get('heat'), CLASS)
  const day = (key: string): string | null => { const d = p.get(key); return d && isDay(d) ? d : null }
  const likes = readChips(p.get('like'))
  const taken = new Set(chipsOf(likes))
  s.question = {
    likes,
    unlikes: readChips(p.get('unlike')).filter((e) => e.kind === 'chip' && !taken.has(e.chip.replace(/\.jpg$/, ''))),
    classes: (p.get('classes') ?? '').slice(0, MOST_TEXT),
    verdicts: p.get('verdictclass') ? { class: (p.get('verdictclass') as string).slice(0, MOST_TEXT) } : p.get('verdictquery') ? { query: (p.get('verdictquery') as string).slice(0, MOST_TEXT) } : null,
    k: Math.round(within(p.get('k'), 1, 1000) ?? 20),
    filters: {
      since: day('since'), until: day('to'), zone: Number.isInteger(within(p.get('zone'), 1, 60)) ? within(p.get('zone'), 1, 60) : null,
      clear: within(p.get('clear'), 0, 1), offNadir: within(p.get('offnadir'), 0, 90), box: readBox(p.get('box')), polygon: readArea(p.get('area')),
      oneAPlace: p.get('one') === '1', otherPlace: p.get('other') === '1', where: (p.get('where') ?? '').slice(0, MOST_TEXT),
    },
  }
  if (s.question.filters.box) s.question.filters.polygon = null
  s.lostPicture = p.get('picture') === '1'
  s.asked = p.get('asked') === '1'
  const view = p.get('view')
  if (view === 'place' || view === 'verdicts') s.view = view satisfies View
  return s
}

/** Hold the state, and tell those who want to know when it changes. */
export class Store {
  #state: State
  #listeners: ((now: State, before: State) => void)[] = []
  constructor(state: State) { this.#state = state }
  get state(): State { return this.#state }
  set(change: Partial<State>): void {
    const before = this.#state
    this.#state = { ...before, ...change }
    for (const listener of this.#listeners) listener(this.#state, before)
  }
  ask(change: Partial<Question>): void { this.set({ question: { ...this.#state.question, ...change } }) }
  filter(change: Partial<Filters>): void { this.ask({ filters: { ...this.#state.question.filters, ...change } }) }
  listen(listener: (now: State, before: State) => void): void { this.#listeners.push(listener) }
}
