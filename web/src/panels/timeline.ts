// Which acquisitions the mosaic shows.
import type { App } from '../app'
import { fill, h, icon, iconButton } from '../dom'
import { acquisitionsAt, formatAcquisition, formatDay, plural } from '../format'
import type { Mosaic } from '../types'

const MODES = [
  { mode: 'best', label: 'Best', title: 'The clearest and steepest view of each region, whatever its date' },
  { mode: 'until', label: 'Up to', title: 'The newest that is not after this date' },
  { mode: 'on', label: 'Only', title: 'Nothing but this date' },
] as const

export class Timeline {
  readonly el: HTMLElement
  readonly #app: App
  readonly #dates: string[]
  readonly #slider: HTMLInputElement
  readonly #modes = new Map<string, HTMLInputElement>()
  readonly #top = h('p.top', { 'data-testid': 'on-top' })
  readonly #day = h('output.day', { 'data-testid': 'day', 'aria-hidden': 'true' })
  readonly #faults = h('button.faults', { type: 'button', hidden: true, 'data-testid': 'tile-faults' })
  readonly #count = h('span')
  readonly #controls: HTMLElement

  constructor(app: App, retry: () => void) {
    this.#app = app
    this.#dates = [...new Set(app.config.dates)].sort()
    const last = Math.max(0, this.#dates.length - 1)
    this.#slider = h('input', { type: 'range', min: 0, max: last, step: 1, 'aria-label': 'Date of the imagery', 'data-testid': 'date-slider', oninput: () => this.#go(Number(this.#slider.value)) })
    this.#faults.append(icon('retry'), this.#count)
    this.#faults.addEventListener('click', retry)
    const ticks = h('div.ticks', { 'aria-hidden': 'true' }, ...(this.#dates.length <= 80 ? this.#dates.map((d, i) => {
      const t = h('span', { class: i === 0 || d.slice(0, 4) !== this.#dates[i - 1]?.slice(0, 4) ? 'year' : '' })
      t.style.insetInlineStart = `${last ? (100 * i) / last : 0}%`
      return t
    }) : []))
    this.#controls = h('div.controls', {}, h('div.segments.modes', { role: 'radiogroup', 'aria-label': 'Which acquisitions' }, ...MODES.map((m) => {
      const input = h('input', { type: 'radio', name: 'mosaic', value: m.mode, 'data-testid': `mosaic-${m.mode}`, onchange: () => this.#choose(m.mode) })
      this.#modes.set(m.mode, input)
      return h('label.segment', { title: m.title }, input, h('span', {}, m.label))
    })), iconButton('back', 'Earlier date', () => this.step(-1), { 'data-testid': 'earlier' }), h('div.track', {}, ticks, this.#slider), iconButton('next', 'Later date', () => this.step(1), { 'data-testid': 'later' }), this.#day)
    this.#controls.hidden = this.#dates.length < 2
    this.el = h('section.timeline', { 'aria-label': 'Dates', 'data-testid': 'timeline' }, this.#controls, h('div.caption', {}, this.#top, this.#faults))
    app.store.listen((now, before) => { if (now.mosaic !== before.mosaic || now.center !== before.center) this.#draw() })
    app.listen((now, before) => { if (now.faults !== before.faults) this.#draw() })
    this.#draw()
  }

  #index(): number {
    const { mosaic } = this.#app.state
    if (mosaic.mode === 'best') return Math.max(0, this.#dates.length - 1)
    const before = this.#dates.filter((d) => d <= mosaic.date).length - 1
    return Math.max(0, before)
  }
  #set(mosaic: Mosaic): void { this.#app.store.set({ mosaic }) }
  #go(i: number): void {
    const date = this.#dates[Math.min(this.#dates.length - 1, Math.max(0, i))]
    if (date) this.#set({ mode: this.#app.state.mosaic.mode === 'on' ? 'on' : 'until', date })
  }
  #choose(mode: Mosaic['mode']): void {
    const date = this.#dates[this.#index()]
    this.#set(mode === 'best' || !date ? { mode: 'best' } : { mode, date })
  }
  step(by: number): void {
    if (this.#dates.length < 2) return
    const fresh = this.#app.state.mosaic.mode === 'best' && by > 0
    this.#go(fresh ? this.#dates.length - 1 : this.#index() + by)
  }

  #draw(): void {
    const { mosaic, center } = this.#app.state
    const { acquisitions, dates } = this.#app.config
    const i = this.#index()
    this.#slider.value = String(i)
    const day = mosaic.mode === 'best' ? 'all dates' : formatDay(mosaic.date)
    this.#slider.setAttribute('aria-valuetext', mosaic.mode === 'best' ? 'Best of all dates' : `${mosaic.mode === 'on' ? 'only' : 'up to'} ${day}`)
    this.#slider.style.setProperty('--at', `${this.#dates.length > 1 ? (100 * i) / (this.#dates.length - 1) : 0}%`)
    this.#day.textContent = day
    this.el.dataset['mode'] = mosaic.mode
    for (const [mode, input] of this.#modes) input.checked = mode === mosaic.mode
    const here = center ? acquisitionsAt(acquisitions, mosaic, center[0], center[1]) : []
    const [first] = here
    const words = !dates.length ? 'No imagery' : !first ? 'No acquisition in the middle of the map' : here.length === 1 || mosaic.mode !== 'best' ? formatAcquisition(first) : `Best of ${plural(here.length, 'acquisition')} here`
    fill(this.#top, first && h('span.soft', {}, mosaic.mode !== 'best' || here.length === 1 ? 'On top ' : ''), words)
    const n = this.#app.live.faults
    this.#faults.hidden = n === 0
    this.#count.textContent = `${plural(n, 'map tile')} missing`
    this.#faults.title = 'Some map tiles could not be read. Load them again'
    this.#faults.setAttribute('aria-label', `${plural(n, 'map tile')} could not be read. Load again`)
  }
}
