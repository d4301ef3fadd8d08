// What people have judged, to look at, search from and take away.
import { url } from '../api'
import { dataOf, type App } from '../app'
import { fill, h, icon, iconButton, picture } from '../dom'
import { formatDay, formatQuery, plural, shortPlace } from '../format'
import type { Subject, Verdict } from '../types'
import { judgementIcon, problem } from './parts'

const MOST = 60

export class VerdictsPanel {
  readonly el = h('section.verdicts', { 'aria-label': 'Verdicts', 'data-testid': 'verdicts' })
  readonly #app: App
  #more = new Set<string>()
  constructor(app: App) {
    this.#app = app
    app.listen((now, before) => { if (now.verdicts !== before.verdicts) this.#draw() })
    this.#draw()
  }

  #draw(): void {
    const r = this.#app.live.verdicts
    const list = dataOf(r)
    if (r.status === 'error') { fill(this.el, problem('The verdicts could not be read', r)); return }
    if (!list) { fill(this.el, h('p.hint', {}, 'Reading…')); return }
    if (!list.length) {
      fill(this.el, h('div.empty', { 'data-testid': 'no-verdicts' }, h('h2', {}, 'No verdicts yet'), h('p', {}, 'Open a place or a result and say yes, no or unsure. Verdicts are saved on the server, can be exported, and can be searched from.')))
      return
    }
    const groups = new Map<string, { subject: Subject; list: Verdict[] }>()
    for (const v of list) {
      const subject: Subject = v.class ? { class: v.class } : { query: v.query ?? '' }
      const key = JSON.stringify(subject)
      const group = groups.get(key) ?? { subject, list: [] }
      group.list.push(v)
      groups.set(key, group)
    }
    const link = (format: 'geojson' | 'csv' | 'jsonl', name: string): HTMLElement =>
      h('a.button.small.quiet', { href: url.verdicts(format, this.#app.where()), download: `verdicts.${format}`, 'data-testid': `export-${format}` }, icon('save'), name)
    fill(this.el, h('header.results-head', {}, h('h2', {}, plural(list.length, 'verdict')), h('div.buttons', {}, link('geojson', 'GeoJSON'), link('csv', 'CSV'), link('jsonl', 'JSONL'))),
      ...[...groups].map(([key, g]) => this.#group(key, g.subject, g.list)))
  }

  #group(key: string, subject: Subject, list: Verdict[]): HTMLElement {
    const app = this.#app
    const count = (v: Verdict['verdict']): number => list.filter((o) => o.verdict === v).length
    const title = 'class' in subject ? app.titleOf(subject.class) : formatQuery(subject.query) || 'without a question'
    const shown = this.#more.has(key) ? list : list.slice(0, MOST)
    return h('article.verdict-group', { 'data-testid': 'verdict-group' },
      h('header', {}, h('div', {}, h('h3', {}, title), h('p.hint', {}, `${count('yes')} yes · ${count('no')} no · ${count('unsure')} unsure`)),
        h('button.button.small', { type: 'button', disabled: !count('yes') || !app.collection, title: 'Yes becomes like, no becomes dislike', 'data-testid': 'search-verdicts', onclick: () => app.askVerdicts(subject) }, icon('search'), 'Search from')),
      h('ul.judged', {}, ...shown.map((v) => this.#item(v))),
      list.length > shown.length && h('button.button.small.quiet', { type: 'button', onclick: () => { this.#more.add(key); this.#draw() } }, `Show all ${list.length}`))
  }
  #item(v: Verdict): HTMLElement {
    const app = this.#app
    return h('li', { 'data-testid': 'verdict', 'data-verdict': v.verdict },
      h('button.open', { type: 'button', 'data-focus': `verdict-${v.id}`, onclick: () => void app.openChip(v.chip) }, picture(url.image(v.chip, 96), ''),
        h('span.verdict-mark', {}, judgementIcon(v.verdict), v.verdict), h('span.soft', {}, `${shortPlace(v.chip)}${v.at ? ` · ${formatDay(v.at)}` : ''}`)),
      iconButton('trash', `Remove the verdict on ${shortPlace(v.chip)}`, () => void app.forget(v), { 'data-testid': 'forget' }))
  }
}
