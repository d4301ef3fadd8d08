// What was found, as pictures with scores.
import { url } from '../api'
import { dataOf, type App } from '../app'
import { download, fill, h, icon, iconButton, picture } from '../dom'
import { distinctCredits, formatCount, formatDay, formatQuery, formatScore, formatTime, plural, shortPlace } from '../format'
import { isAsking, sideOf } from '../query'
import type { ResultFeature, SearchAnswer } from '../types'
import { judgementIcon, problem, swatch } from './parts'

const SHOWN = 120

export interface ResultActions { open(chip: string): void; addClass(name: string): void; choosePicture(): void }

export class ResultsPanel {
  readonly el = h('section.results', { 'aria-label': 'Results', 'data-testid': 'results' })
  readonly #app: App
  readonly #actions: ResultActions
  readonly #cards = new Map<string, HTMLElement>()
  #list: HTMLElement | null = null
  #shown = SHOWN
  #at = 0

  constructor(app: App, actions: ResultActions) {
    this.#app = app
    this.#actions = actions
    app.listen((now, before) => {
      if (now.answer !== before.answer) { if (now.answer.status === 'ready') { this.#at = 0; this.#shown = SHOWN }; this.#draw() }
      if (now.verdicts !== before.verdicts) this.#mark()
      if (now.suggestions !== before.suggestions && now.answer.status === 'idle') this.#draw()
      if (now.hover !== before.hover) this.#hover(now.hover)
    })
    app.store.listen((now, before) => {
      if (now.question !== before.question) { if (this.#app.live.answer.status === 'idle') this.#draw(); this.#mark() }
      if (now.chip !== before.chip) this.#mark()
    })
    this.#draw()
  }

  #draw(): void {
    const { answer } = this.#app.live
    const data = dataOf(answer)
    this.#cards.clear()
    this.#list = null
    this.el.classList.toggle('stale', answer.status === 'loading' && data !== null)
    this.el.setAttribute('aria-busy', String(answer.status === 'loading'))
    if (answer.status === 'error') fill(this.el, problem('The search failed', answer))
    else if (data) this.#drawAnswer(data)
    else if (answer.status === 'loading') fill(this.el, h('div.grid', { 'aria-hidden': 'true', 'data-testid': 'loading' }, ...Array.from({ length: 9 }, () => h('div.card.skeleton', {}, h('div.thumb')))))
    else fill(this.el, this.#empty())
    this.#mark()
  }

  #empty(): HTMLElement {
    const app = this.#app
    const c = app.collection
    if (!c) return h('div.empty', { 'data-testid': 'no-schema' }, h('h2', {}, 'The imagery, without search'), h('p', {}, 'No similarity schema is loaded. The map and the labels work; start the server with a schema to search.'))
    if (isAsking(app.question)) return h('div.empty', {}, h('p', {}, 'Press Enter or Search to ask.'))
    return h('div.empty', { 'data-testid': 'empty' },
      h('h2', {}, 'Where else does it look like this?'),
      h('ul.ways', {},
        h('li', {}, icon('fit'), h('span', {}, 'Click a place on the map, then ', h('b', {}, 'Find similar'), '.')),
        h('li', {}, icon('picture'), h('span', {}, 'Drop or paste a picture anywhere, or ', h('button.textual', { type: 'button', onclick: () => this.#actions.choosePicture() }, 'choose one'), '.')),
        c.classes.length > 0 && h('li', {}, icon('layers'), h('span', {}, 'Write classes such as ', h('code', {}, 'forest, no water'), ', or pick one:'))),
      app.live.suggestions.length > 0 ? this.#suggested() : c.classes.length > 0 && h('div.classes', { 'data-testid': 'class-choices' }, ...c.classes.slice(0, 40).map((name) => h('button.class', { type: 'button', onclick: () => this.#actions.addClass(name), title: `Search for ${app.titleOf(name)}` }, swatch(app.colourOf(name)), app.titleOf(name)))))
  }

  #suggested(): HTMLElement {
    const app = this.#app
    return h('ul.grid.suggested', { 'data-testid': 'suggestions' }, ...app.live.suggestions.slice(0, 12).map((s) => h('li', {},
      h('button.class-card', { type: 'button', 'data-class': s.class, title: `Search for ${s.class}`, onclick: () => { app.store.ask({ classes: s.class }); void app.ask() } },
        picture(url.image(s.chip, 192), '', { width: 192, height: 192 }), h('span.name', {}, swatch(app.colourOf(s.class)), h('span', {}, app.titleOf(s.class))), h('span.count', { title: plural(s.chips, 'chip') }, formatCount(s.chips))))))
  }

  #drawAnswer(data: SearchAnswer): void {
    const n = data.features.length
    const facts = [data.score.name, data.took_ms === undefined ? '' : formatTime(data.took_ms), data.exact === false ? 'approximate' : ''].filter(Boolean).join(' · ')
    const head = h('header.results-head', {},
      h('div', {}, h('h2', { 'data-testid': 'results-count' }, n ? `${formatCount(n)} of ${plural(data.total, 'chip')}` : 'Nothing found'), h('p.hint', { 'data-testid': 'query-text' }, formatQuery(data.query.text)), h('p.hint.facts', {}, facts)),
      n > 0 && h('button.button.small.quiet', { type: 'button', 'data-testid': 'export', title: 'Save the results as GeoJSON', onclick: () => this.#export(data) }, icon('save'), 'GeoJSON'))
    if (!n) { fill(this.el, head, h('p', {}, data.note ?? 'No chip passes the filters.'), this.#funnel(data, true)); return }
    const more = data.features.length - this.#shown
    this.#list = h('ul.grid', { 'data-testid': 'result-list', onkeydown: (e: KeyboardEvent) => this.#key(e) }, ...data.features.slice(0, this.#shown).map((f, i) => this.#card(f, i)))
    fill(this.el, head, this.#list,
      more > 0 && h('button.button.quiet', { type: 'button', onclick: () => { this.#shown += SHOWN; this.#draw() } }, `Show ${formatCount(Math.min(more, SHOWN))} more`),
      data.funnel.length > 1 && this.#funnel(data, false), data.credits.length > 0 && h('p.hint.credits-line', {}, distinctCredits(data.credits).join(' · ')))
  }

  #funnel(data: SearchAnswer, open: boolean): HTMLElement | null {
    if (!data.funnel.length) return null
    const most = Math.max(1, ...data.funnel.map((f) => f[1]))
    return h('details.funnel', { open, 'data-testid': 'funnel' }, h('summary', {}, 'What each filter left'),
      h('ol', {}, ...data.funnel.map(([text, count, unknown]) => {
        const bar = h('span.bar', { 'aria-hidden': 'true' })
        bar.style.inlineSize = `${Math.max(count ? 2 : 0, (100 * count) / most)}%`
        return h('li', {}, h('span', {}, text, typeof unknown === 'number' && unknown > 0 && h('span.soft', {}, ` (${formatCount(unknown)} not known)`)), h('b', {}, formatCount(count)), bar)
      })))
  }

  #card(f: ResultFeature, i: number): HTMLElement {
    const app = this.#app
    const { chip, score, date, rank } = f.properties
    const words = `Result ${rank}, score ${formatScore(score)}, ${formatDay(date)}, place ${shortPlace(chip)}`
    const card = h('li.card', { 'data-testid': 'result', 'data-chip': chip, onpointerenter: () => app.know({ hover: chip }), onpointerleave: () => app.know({ hover: null }) },
      h('button.thumb', { type: 'button', 'aria-label': words, title: `${rank} · ${formatDay(date)}`, tabindex: i === this.#at ? '0' : '-1', 'data-focus': `result-${chip}`, onclick: () => this.#actions.open(chip), onfocus: () => { this.#rove(i); app.know({ hover: chip }) }, onblur: () => app.know({ hover: null }) },
        picture(url.image(chip, 192), '', { loading: i < 12 ? 'eager' : 'lazy', width: 192, height: 192 }), h('span.mark', { 'aria-hidden': 'true' })),
      h('div.card-foot', {}, h('span.score', { 'data-testid': 'score' }, formatScore(score)),
        iconButton('plus', `Like result ${rank}`, () => app.toggleExample(chip, 'likes'), { tabindex: '-1', 'data-testid': 'card-like', 'data-side': 'likes' }),
        iconButton('minus', `Dislike result ${rank}`, () => app.toggleExample(chip, 'unlikes'), { tabindex: '-1', 'data-testid': 'card-unlike', 'data-side': 'unlikes' })))
    this.#cards.set(chip, card)
    return card
  }

  /** Bring what is known of each result into its card. */
  #mark(): void {
    const app = this.#app
    const subject = app.subject()
    for (const [chip, card] of this.#cards) {
      const side = sideOf(app.question, chip)
      const verdict = app.verdictOf(chip, subject)?.verdict ?? null
      card.classList.toggle('open', app.state.chip === chip)
      card.dataset['side'] = side ?? ''
      for (const b of card.querySelectorAll<HTMLElement>('[data-side]')) b.setAttribute('aria-pressed', String(b.dataset['side'] === side))
      const mark = card.querySelector('.mark')
      if (mark && card.dataset['verdict'] !== (verdict ?? '')) { card.dataset['verdict'] = verdict ?? ''; fill(mark, verdict && judgementIcon(verdict)) }
    }
  }
  #hover(chip: string | null): void {
    for (const [name, card] of this.#cards) card.classList.toggle('hover', name === chip)
    if (chip && this.#list && !this.#list.matches(':hover')) this.#cards.get(chip)?.scrollIntoView({ block: 'nearest' })
  }

  #rove(i: number): void {
    this.#at = i
    ;[...this.#cards.values()].forEach((c, j) => c.querySelector('.thumb')?.setAttribute('tabindex', j === i ? '0' : '-1'))
  }
  /** Go to the next or an earlier result. */
  step(by: number): void {
    const cards = [...this.#cards.values()]
    if (!cards.length) return
    const inside = this.el.contains(document.activeElement)
    const i = inside ? Math.min(cards.length - 1, Math.max(0, this.#at + by)) : this.#at
    cards[i]?.querySelector<HTMLElement>('.thumb')?.focus()
  }
  focused(): string | null {
    const card = document.activeElement?.closest<HTMLElement>('.card')
    return card && this.el.contains(card) ? (card.dataset['chip'] ?? null) : null
  }
  #key(e: KeyboardEvent): void {
    const columns = this.#list ? getComputedStyle(this.#list).gridTemplateColumns.split(' ').length : 1
    const by = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns, Home: -1e6, End: 1e6 }[e.key]
    if (by === undefined) return
    e.preventDefault()
    this.step(by)
  }

  #export(data: SearchAnswer): void {
    const { features, query, score, credits, funnel } = data
    const out = { type: 'FeatureCollection', name: query.text, query, score, credits: distinctCredits([...this.#app.config.credits, ...credits]), funnel, features }
    download(`imagesim-results-${features.length}.geojson`, JSON.stringify(out), 'application/geo+json')
    this.#app.announce('Saved as GeoJSON')
  }
}
