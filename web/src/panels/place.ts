// One place: its picture, dates, labels and classes, and what can be done with it.
import { url } from '../api'
import { dataOf, type App } from '../app'
import { fill, h, icon, iconButton, picture } from '../dom'
import { formatDay, formatDegrees, formatMeasure, formatPosition, formatQuery, formatShare, catalogOf } from '../format'
import { sideOf } from '../query'
import type { ChipAtDate, Label, Place, Subject } from '../types'
import { JUDGEMENTS, judgementIcon, problem, swatch } from './parts'

interface Row { name: string; title: string; colour: string; label: Label | null; p: number | null; threshold: number | null }

export class PlacePanel {
  readonly el = h('aside.place.panel', { 'aria-label': 'Place', id: 'place', tabindex: '-1', 'data-testid': 'place', hidden: true })
  readonly #app: App
  readonly #body = h('div.scroll')
  readonly #title = h('h2', { 'data-testid': 'place-title' })
  #subject = ''

  constructor(app: App, handle: () => HTMLElement) {
    this.#app = app
    this.el.append(handle(), h('header.panel-head', {}, iconButton('back', 'Back to the results', () => app.store.set({ view: 'search' }), { class: 'icon-button narrow-only', 'data-testid': 'back' }), this.#title,
      iconButton('close', 'Close the place', () => app.closePlace(), { 'data-testid': 'close-place' })), this.#body)
    app.listen((now, before) => { if (now.place !== before.place || now.features !== before.features || now.verdicts !== before.verdicts || now.answer !== before.answer) this.#draw() })
    app.store.listen((now, before) => { if (now.question !== before.question || now.heat !== before.heat) this.#draw() })
    this.#draw()
  }

  #draw(): void {
    const r = this.#app.live.place
    const data = dataOf(r)
    this.el.hidden = r.status === 'idle'
    this.el.setAttribute('aria-busy', String(r.status === 'loading'))
    this.el.classList.toggle('stale', r.status === 'loading' && data !== null)
    if (r.status === 'idle') return
    const top = this.#body.scrollTop
    this.#title.textContent = data ? data.place : 'Place'
    if (r.status === 'error') fill(this.#body, problem('The place could not be read', r))
    else if (data) fill(this.#body, ...this.#place(data))
    else fill(this.#body, h('div.chip-picture.skeleton'), h('div.line.skeleton'), h('div.line.skeleton'))
    this.#body.scrollTop = top
  }

  #place(p: Place): (HTMLElement | null)[] {
    const now = p.chips.find((c) => c.chip === p.chip)
    return [h('div.overview', {}, this.#picture(p, now), this.#dates(p), this.#facts(p, now)), this.#actions(p, now), this.#verdict(p, now), this.#classes(p)]
  }

  #picture(p: Place, now: ChipAtDate | undefined): HTMLElement {
    const heat = this.#app.heatUrl()
    const old = this.#body.querySelector<HTMLElement>('.chip-picture')
    const src = url.image(p.chip, 512)
    // keep the picture that is there: a new one would blink
    const img = old?.querySelector<HTMLImageElement>('img.chip') ?? picture(src, '', { class: 'chip', 'data-testid': 'chip-image' })
    if (img.getAttribute('src') !== src) { img.classList.remove('broken'); img.src = src }
    img.alt = `The place on ${formatDay(now?.date)}`
    const over = heat ? picture(heat, `Where the encoder sees ${this.#app.titleOf(this.#app.state.heat ?? '')}`, { class: 'heat', 'data-testid': 'heat' }) : null
    const oldHeat = old?.querySelector<HTMLImageElement>('img.heat')
    const shown = over && oldHeat?.getAttribute('src') === heat ? oldHeat : over
    const waiting = shown !== null && !shown.complete
    const ready = (e: Event): void => {
      (e.target as Element).closest('.chip-picture')?.classList.remove('waiting')
      if (e.type === 'error') this.#app.notify({ text: 'The overlay could not be read.', bad: true })
    }
    if (shown && shown !== oldHeat) for (const kind of ['load', 'error']) shown.addEventListener(kind, ready, { once: true })
    return h(`figure.chip-picture${waiting ? '.waiting' : ''}` as 'figure', {}, img, shown, heat && h('figcaption.badge', {}, swatch(this.#app.colourOf(this.#app.state.heat ?? '')), this.#app.titleOf(this.#app.state.heat ?? '')))
  }

  #dates(p: Place): HTMLElement | null {
    if (p.chips.length < 2) return null
    const sorted = p.chips.toSorted((a, b) => a.date.localeCompare(b.date) || a.catalog_id.localeCompare(b.catalog_id))
    const step = (e: KeyboardEvent): void => {
      const by = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 1, ArrowUp: -1 }[e.key]
      if (!by) return
      e.preventDefault()
      const i = sorted.findIndex((c) => c.chip === p.chip) + by
      const to = sorted[(i + sorted.length) % sorted.length]
      if (to) void this.#app.openChip(to.chip, false)
    }
    return h('div.dates', { role: 'radiogroup', 'aria-label': 'Acquisition', 'data-testid': 'dates', onkeydown: step }, ...sorted.map((c) =>
      h('button.date', { type: 'button', role: 'radio', 'aria-checked': String(c.chip === p.chip), tabindex: c.chip === p.chip ? '0' : '-1', title: c.catalog_id, 'data-date': c.date, 'data-focus': `date-${c.chip === p.chip ? 'now' : c.chip}`, onclick: () => void this.#app.openChip(c.chip, false) }, formatDay(c.date))))
  }

  #facts(p: Place, now: ChipAtDate | undefined): HTMLElement {
    const a = this.#app.config.acquisitions.find((o) => o.catalog_id === (now?.catalog_id ?? catalogOf(p.chip)))
    const rows: [string, string][] = []
    if (p.chips.length < 2) rows.push(['Taken', formatDay(now?.date)])
    if (a?.sensor) rows.push(['Sensor', a.sensor])
    if (typeof now?.off_nadir === 'number') rows.push(['Off-nadir', formatDegrees(Math.round(now.off_nadir * 10) / 10)])
    if (typeof now?.clear === 'number') rows.push(['Clear', formatShare(now.clear)])
    if (typeof now?.valid === 'number' && now.valid < 0.995) rows.push(['Imaged', formatShare(now.valid)])
    rows.push(['Position', formatPosition(p.lon, p.lat)])
    return h('dl.facts', {}, ...rows.map(([k, v]) => h('div', {}, h('dt', {}, k), h('dd', {}, v))))
  }

  #actions(p: Place, now: ChipAtDate | undefined): HTMLElement | null {
    const app = this.#app
    if (!app.collection) return null
    if (now && !now.indexed) return h('p.hint.warn', { 'data-testid': 'not-indexed' }, 'This chip is not in the collection, so nothing can be compared with it. Another date may be.')
    const side = sideOf(app.question, p.chip)
    return h('div.row.actions', {},
      h('button.button.primary', { type: 'button', 'data-testid': 'find-similar', 'data-focus': 'find-similar', title: 'Find similar (S)', onclick: () => app.findSimilar(p.chip) }, icon('search'), 'Find similar'),
      h('button.button', { type: 'button', 'aria-pressed': String(side === 'likes'), 'data-testid': 'like', 'data-focus': 'like', title: 'Like (L)', onclick: () => app.toggleExample(p.chip, 'likes') }, icon('plus'), 'Like'),
      h('button.button', { type: 'button', 'aria-pressed': String(side === 'unlikes'), 'data-testid': 'unlike', 'data-focus': 'unlike', title: 'Dislike (U)', onclick: () => app.toggleExample(p.chip, 'unlikes') }, icon('minus'), 'Dislike'))
  }

  #subjects(p: Place): { key: string; text: string; subject: Subject }[] {
    const app = this.#app
    const asked = app.subject()
    const names = p.probs?.map((o) => o.class) ?? app.collection?.classes ?? []
    const out = names.map((name) => ({ key: `class:${name}`, text: app.titleOf(name), subject: { class: name } as Subject }))
    const best = p.probs?.reduce((a, b) => (b.p > a.p ? b : a), p.probs[0] ?? { class: '', p: -1 }).class
    out.sort((a, b) => Number(b.key === `class:${best}`) - Number(a.key === `class:${best}`))
    if (asked && 'query' in asked) out.unshift({ key: 'query', text: `a match: ${formatQuery(asked.query)}`, subject: asked })
    if (asked && 'class' in asked) out.sort((a, b) => Number(b.key === `class:${asked.class}`) - Number(a.key === `class:${asked.class}`))
    return out
  }
  /** What the reader judges at the moment. */
  subject(): Subject | null {
    const p = dataOf(this.#app.live.place)
    const all = p ? this.#subjects(p) : []
    return (all.find((o) => o.key === this.#subject) ?? all[0])?.subject ?? null
  }
  #verdict(p: Place, now: ChipAtDate | undefined): HTMLElement | null {
    const app = this.#app
    const all = this.#subjects(p)
    const subject = this.subject()
    if (!app.config.verdicts || !subject || now?.indexed === false) return null
    const given = app.verdictOf(p.chip, subject)?.verdict
    const chosen = all.find((o) => o.key === this.#subject) ?? all[0]
    const select = h('select', { 'aria-label': 'What is judged', 'data-testid': 'subject', 'data-focus': 'subject', onchange: () => { this.#subject = select.value; this.#draw() } }, ...all.map((o) => h('option', { value: o.key, selected: o === chosen }, o.text)))
    return h('div.verdict', { role: 'group', 'aria-label': 'Verdict' }, h('label.ask', {}, h('span', {}, 'Is it'), select),
      h('div.segments', {}, ...JUDGEMENTS.map((j) => h('button.segment', { type: 'button', 'aria-pressed': String(given === j.verdict), 'data-verdict': j.verdict, 'data-testid': `verdict-${j.verdict}`, 'data-focus': `verdict-${j.verdict}`, title: `${j.label} (${j.key})`, onclick: () => void app.judge(p.chip, j.verdict, subject) }, judgementIcon(j.verdict), j.label))))
  }

  #rows(p: Place): Row[] {
    const app = this.#app
    const names = new Set([...(p.probs ?? []).map((o) => o.class), ...(p.labels ?? []).map((o) => o.class)])
    const rows = [...names].map((name): Row => {
      const label = p.labels?.find((o) => o.class === name) ?? null
      const prob = p.probs?.find((o) => o.class === name) ?? null
      return { name, title: label?.title || app.titleOf(name), colour: app.colourOf(name), label, p: prob?.p ?? null, threshold: prob?.threshold ?? null }
    })
    return rows.sort((a, b) => (b.p ?? -1) - (a.p ?? -1) || Number(b.label?.state === 'present') - Number(a.label?.state === 'present'))
  }
  #classes(p: Place): HTMLElement {
    const app = this.#app
    const rows = this.#rows(p)
    if (!rows.length) return h('p.hint', { 'data-testid': 'no-classes' }, 'Neither labels nor class probabilities are known here.')
    const canHeat = Boolean(app.collection?.heat)
    const has = { labels: p.labels !== null, probs: p.probs !== null }
    return h('section.classes-section', { 'aria-label': 'Classes' },
      h('header', {}, h('h3', {}, 'Classes'), has.labels && h('button.button.small.quiet', { type: 'button', 'aria-pressed': String(app.live.features !== null), 'data-testid': 'features', 'data-focus': 'features', onclick: () => void app.toggleFeatures() }, icon('eye'), 'Show OSM')),
      h('table.class-table', { 'data-testid': 'class-table' },
        h('thead', {}, h('tr', {}, h('th', { scope: 'col' }, canHeat ? 'Where in the chip' : 'Class'), has.labels && h('th', { scope: 'col', title: 'What OpenStreetMap says' }, 'In OSM'), has.probs && h('th', { scope: 'col' }, 'Encoder'))),
        h('tbody', {}, ...rows.map((r) => this.#row(r, has, canHeat)))),
      !has.labels ? h('p.hint', {}, 'No labels were made for this place.') : null)
  }
  #row(r: Row, has: { labels: boolean; probs: boolean }, canHeat: boolean): HTMLElement {
    const app = this.#app
    const on = app.state.heat === r.name
    const name = canHeat && r.p !== null
      ? h('button.class-name', { type: 'button', 'aria-pressed': String(on), 'data-focus': `heat-${r.name}`, title: `Where the encoder sees ${r.title}`, onclick: () => app.setHeat(on ? null : r.name) }, swatch(r.colour), h('span', {}, r.title))
      : h('span.class-name', {}, swatch(r.colour), h('span', {}, r.title))
    const bar = h('span.meter', { 'aria-hidden': 'true' }, h('span.value'))
    if (r.p !== null) (bar.firstElementChild as HTMLElement).style.inlineSize = `${Math.max(1, r.p * 100)}%`
    const likely = r.p !== null && r.p >= (r.threshold ?? 0.5)
    return h('tr', { 'data-class': r.name, class: on ? 'on' : '' }, h('th', { scope: 'row' }, name),
      has.labels && h('td', {}, r.label && h(`span.state.${r.label.state}`, { 'data-state': r.label.state }, h('span.shape', { 'aria-hidden': 'true' }), h('span', {}, r.label.state === 'present' ? formatMeasure(r.label) || 'present' : r.label.state, r.label.state === 'present' && h('span.visually-hidden', {}, ' present')))),
      has.probs && h('td', {}, r.p !== null && h(`span.prob${likely ? '.likely' : ''}` as 'span', {}, bar, h('span.number', {}, formatShare(r.p)))))
  }
}
