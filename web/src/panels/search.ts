// What is asked: classes, examples, filters.
import { url } from '../api'
import type { App } from '../app'
import { fill, h, icon, iconButton, picture } from '../dom'
import { plural, formatCount, formatQuery, formatShare, shortPlace } from '../format'
import { chosen, completions, exampleKey, filterWords, isAsking } from '../query'
import { MOST_TEXT, noFilters } from '../state'
import type { Example, Filters } from '../types'
import { swatch } from './parts'

export interface SearchActions { draw(kind: 'box' | 'polygon'): void; useView(): void; help(): void }

export class SearchPanel {
  readonly el: HTMLElement
  readonly input: HTMLInputElement
  readonly #app: App
  readonly #actions: SearchActions
  readonly #suggest = h('ul.suggest', { id: 'suggestions', role: 'listbox', 'aria-label': 'Classes', hidden: true })
  readonly #examples = h('div.examples')
  readonly #pills = h('div.pills')
  readonly #filters = h('fieldset.filters', { id: 'filters', hidden: 'hidden', 'data-testid': 'filters' })
  readonly #toggle: HTMLButtonElement
  readonly #picture = h('button.button.quiet', { type: 'button', 'data-testid': 'add-picture', title: 'Choose, paste or drop a picture', onclick: () => this.choosePicture() }, icon('picture'), 'Picture')
  readonly #go: HTMLButtonElement
  readonly #clear: HTMLButtonElement
  readonly #lost = h('p.hint.warn', { hidden: true, 'data-testid': 'lost-picture' }, 'This link was made with a picture. Links hold no pictures: drop it here again.')
  readonly #file = h('input', { type: 'file', accept: 'image/*', class: 'visually-hidden', tabindex: '-1', 'aria-label': 'Picture to look for', 'data-testid': 'file' })
  readonly #fields: { [key: string]: HTMLInputElement } = {}
  readonly #area = h('span.hint')
  readonly #areaButtons = new Map<string, HTMLButtonElement>()
  #option = -1

  constructor(app: App, actions: SearchActions) {
    this.#app = app
    this.#actions = actions
    this.input = h('input', {
      type: 'text', id: 'classes', placeholder: 'forest and water, no road', autocomplete: 'off', autocapitalize: 'off', spellcheck: 'false', maxlength: MOST_TEXT, role: 'combobox', 'aria-label': 'Search by classes',
      'aria-autocomplete': 'list', 'aria-expanded': 'false', 'aria-controls': 'suggestions', 'data-testid': 'classes', oninput: () => this.#typed(), onkeydown: (e: KeyboardEvent) => this.#key(e), onblur: () => { this.#offer([]) },
    })
    this.#toggle = h('button.button.quiet', { type: 'button', 'aria-expanded': 'false', 'aria-controls': 'filters', 'data-testid': 'filters-toggle', onclick: () => this.#showFilters(this.#filters.hasAttribute('hidden')) }, icon('filter'), 'Filters')
    this.#go = h('button.button.primary', { type: 'submit', 'data-testid': 'ask' }, icon('search'), 'Search')
    this.#clear = h('button.button.quiet', { type: 'button', 'data-testid': 'clear', onclick: () => { app.clearQuestion(); this.input.focus() } }, 'Clear')
    this.#file.addEventListener('change', () => { const [file] = this.#file.files ?? []; if (file) void app.addPicture(file, file.name); this.#file.value = '' })
    this.#buildFilters()
    const line = h('div.field', {}, icon('search'), this.input, iconButton('help', 'How to write classes and filters', actions.help), this.#suggest)
    this.el = h('form.composer', { 'aria-label': 'Search', novalidate: true, onsubmit: (e: Event) => { e.preventDefault(); this.#offer([]); void app.ask() } },
      this.#sources(), line, this.#examples, this.#lost, this.#file, h('div.row.tools', {}, this.#toggle, this.#picture), this.#filters, this.#pills, h('div.row.actions', {}, this.#go, this.#clear))
    this.el.hidden = !app.collection
    app.store.listen((now, before) => { if (now.question !== before.question || now.lostPicture !== before.lostPicture) this.#update() })
    app.listen((now, before) => { if (now.answer !== before.answer || now.uploading !== before.uploading || now.drawing !== before.drawing) this.#update() })
    this.#update()
  }

  /** Let the reader choose among several collections; with one there is nothing to choose. */
  #sources(): HTMLElement | null {
    const app = this.#app
    const all = app.config.schemas.flatMap((s) => s.collections.map((c) => ({ s, c })))
    if (all.length < 2) return null
    const now = chosen(app.config, app.state)
    const select = h('select', { 'aria-label': 'Collection', 'data-testid': 'collection', onchange: () => {
      const pick = all[select.selectedIndex]
      if (pick) app.useCollection(pick.s.name, pick.c.name)
    } }, ...all.map(({ s, c }) => h('option', { selected: now?.schema === s && now.collection === c }, `${s.name} / ${c.name} (${plural(c.chips, 'chip')})`)))
    return h('label.source', {}, h('span', {}, 'In'), select)
  }

  // -- classes

  #typed(): void {
    this.#app.store.ask({ classes: this.input.value })
    const { words } = completions(this.input.value, this.input.selectionStart ?? this.input.value.length, this.#app.collection?.classes ?? [])
    this.#offer(words)
  }
  #offer(words: string[]): void {
    this.#option = -1
    this.#suggest.hidden = !words.length
    this.input.setAttribute('aria-expanded', String(words.length > 0))
    this.input.removeAttribute('aria-activedescendant')
    fill(this.#suggest, ...words.map((w, i) => h('li', { id: `suggestion-${i}`, role: 'option', 'aria-selected': 'false', onpointerdown: (e: Event) => { e.preventDefault(); this.#complete(w) } }, swatch(this.#app.colourOf(w)), w)))
  }
  #complete(word: string): void {
    const caret = this.input.selectionStart ?? this.input.value.length
    const { start } = completions(this.input.value, caret, this.#app.collection?.classes ?? [])
    const rest = this.input.value.slice(caret)
    this.input.value = `${this.input.value.slice(0, start)}${word}${rest || ' '}`
    const at = start + word.length + (rest ? 0 : 1)
    this.input.setSelectionRange(at, at)
    this.#app.store.ask({ classes: this.input.value })
    this.#offer([])
  }
  #key(e: KeyboardEvent): void {
    const options = [...this.#suggest.children]
    if (!options.length) return
    if (e.key === 'ArrowDown' || e.key === 'ArrowUp') {
      this.#option = (this.#option + (e.key === 'ArrowDown' ? 1 : options.length - (this.#option < 0 ? 0 : 1))) % options.length
      options.forEach((o, i) => { o.setAttribute('aria-selected', String(i === this.#option)) })
      this.input.setAttribute('aria-activedescendant', `suggestion-${this.#option}`)
    } else if ((e.key === 'Enter' && this.#option >= 0) || (e.key === 'Tab' && !e.shiftKey && this.#option >= 0)) this.#complete(options[this.#option]?.textContent ?? '')
    else if (e.key === 'Escape') this.#offer([])
    else return
    e.preventDefault()
    e.stopPropagation()
  }
  addClass(name: string): void {
    const now = this.#app.question.classes.trim()
    this.#app.store.ask({ classes: now ? `${now} and ${name}` : name })
  }
  choosePicture(): void { this.#file.click() }

  // -- examples

  #example(e: Example, liked: boolean): HTMLElement {
    const app = this.#app
    const name = e.kind === 'chip' ? shortPlace(e.chip) : e.name
    const side = liked ? 'like' : 'unlike'
    return h(`div.example.${side}`, { 'data-testid': side, 'data-example': exampleKey(e) },
      h('button.thumb', { type: 'button', title: `${name}: turn into ${liked ? 'a dislike' : 'a like'}`, 'aria-label': `${liked ? 'Like' : 'Dislike'} ${name}; turn into ${liked ? 'a dislike' : 'a like'}`, 'data-focus': `side-${exampleKey(e)}`, onclick: () => app.otherSide(e) },
        picture(e.kind === 'chip' ? url.image(e.chip, 128) : e.thumb, ''), h('span.sign', { 'aria-hidden': 'true' }, icon(liked ? 'plus' : 'minus'))),
      iconButton('close', `Remove ${name}`, () => app.dropExample(exampleKey(e)), { class: 'icon-button remove', 'data-focus': `drop-${exampleKey(e)}` }))
  }

  // -- filters

  #showFilters(show: boolean): void {
    this.#filters.toggleAttribute('hidden', !show)
    this.#toggle.setAttribute('aria-expanded', String(show))
  }
  #field(key: string, label: string, props: Record<string, unknown>, read: (text: string) => Partial<Filters>): HTMLElement {
    const input = h('input', { 'data-testid': `filter-${key}`, ...props, onchange: () => { this.#app.store.filter(read(input.value)) } })
    this.#fields[key] = input
    return h('label.setting', {}, h('span', {}, label), input)
  }
  #check(key: 'oneAPlace' | 'otherPlace', label: string): HTMLElement {
    const input = h('input', { type: 'checkbox', 'data-testid': `filter-${key}`, onchange: () => { this.#app.store.filter({ [key]: input.checked }) } })
    this.#fields[key] = input
    return h('label.check', {}, input, h('span', {}, label))
  }
  #slider(key: 'clear' | 'offNadir', label: string, props: Record<string, unknown>, read: (x: number) => number | null, words: (x: number | null) => string): HTMLElement {
    const out = h('output', {})
    const input = h('input', { type: 'range', 'data-testid': `filter-${key}`, ...props, oninput: () => { this.#app.store.filter({ [key]: read(Number(input.value)) }) } })
    this.#fields[key] = input
    this.#app.store.listen((now) => { out.textContent = words(now.question.filters[key]) })
    out.textContent = words(this.#app.question.filters[key])
    return h('label.setting.slider', {}, h('span', {}, label), input, out)
  }
  #buildFilters(): void {
    const { config } = this.#app
    const [first, last] = [config.dates[0] ?? '', config.dates.at(-1) ?? '']
    const zones = new Set(config.acquisitions.flatMap((a) => (a.bounds ? [Math.floor((a.bounds[0] + 180) / 6) + 1, Math.floor((a.bounds[2] + 180) / 6) + 1] : [])))
    const button = (name: 'box' | 'polygon' | 'view', label: string, act: () => void): HTMLButtonElement => {
      const b = h('button.button.small', { type: 'button', 'data-testid': `draw-${name}`, onclick: act }, icon(name), label)
      this.#areaButtons.set(name, b)
      return b
    }
    const day = (text: string): string | null => text || null
    const number = (text: string): number | null => (text.trim() === '' || !Number.isFinite(Number(text)) ? null : Number(text))
    this.#filters.append(h('legend.visually-hidden', {}, 'Filters'),
      h('div.pair', {},
        this.#field('since', 'From', { type: 'date', min: first, max: last }, (t) => ({ since: day(t) })),
        this.#field('until', 'To', { type: 'date', min: first, max: last }, (t) => ({ until: day(t) }))),
      h('div.setting', { role: 'group', 'aria-label': 'Area' }, h('span', {}, 'Area'),
        h('div.buttons', {}, button('box', 'Box', () => this.#actions.draw('box')), button('polygon', 'Outline', () => this.#actions.draw('polygon')), button('view', 'This view', () => this.#actions.useView())), this.#area),
      this.#slider('clear', 'Clear at least', { min: 0, max: 100, step: 5 }, (x) => (x ? x / 100 : null), (x) => (x === null ? 'any' : formatShare(x))),
      this.#slider('offNadir', 'Off-nadir at most', { min: 5, max: 60, step: 1 }, (x) => (x < 60 ? x : null), (x) => (x === null ? 'any' : `${x}°`)),
      h('div.pair', {},
        this.#field('k', 'Results', { type: 'number', min: 1, max: config.limits.k, step: 1, inputmode: 'numeric' }, (t) => { this.#app.store.ask({ k: Math.min(config.limits.k, Math.max(1, Math.round(number(t) ?? 20))) }); return {} }),
        this.#field('zone', 'UTM zone', { type: 'number', min: 1, max: 60, step: 1, inputmode: 'numeric', placeholder: zones.size === 1 ? String([...zones][0]) : 'any' }, (t) => { const z = number(t); return { zone: z !== null && z >= 1 && z <= 60 ? Math.round(z) : null } })),
      h('div.checks', {}, this.#check('oneAPlace', 'One result a place'), this.#check('otherPlace', 'Other places only')),
      this.#field('where', 'Condition', { type: 'text', placeholder: 'off_nadir<25 and clear>=0.9', maxlength: MOST_TEXT, spellcheck: 'false', autocapitalize: 'off' }, (t) => ({ where: t })))
  }

  #update(): void {
    const { question: q, lostPicture } = this.#app.state
    const { answer, uploading, drawing } = this.#app.live
    const f = q.filters
    if (this.input.value !== q.classes) this.input.value = q.classes
    fill(this.#examples,
      q.verdicts && h('div.example.text', { 'data-testid': 'from-verdicts' }, icon('check'), h('span', {}, `verdicts on ${'class' in q.verdicts ? this.#app.titleOf(q.verdicts.class) : formatQuery(q.verdicts.query)}`),
        iconButton('close', 'Do not search from verdicts', () => this.#app.store.ask({ verdicts: null }))),
      ...q.likes.map((e) => this.#example(e, true)), ...q.unlikes.map((e) => this.#example(e, false)),
      uploading && h('div.example.skeleton', { role: 'status', 'aria-label': 'Sending the picture' }))
    this.#examples.hidden = !this.#examples.childElementCount
    this.#picture.disabled = uploading
    this.#lost.hidden = !lostPicture
    this.#pills.hidden = !filterWords(f).length
    const words = filterWords(f)
    fill(this.#pills, ...words.map((w) => h('span.pill', {}, h('span', {}, w.text), iconButton('close', `Remove filter: ${w.text}`, () => this.#app.store.filter({ [w.key]: noFilters()[w.key] }), { 'data-testid': `unfilter-${w.key}` }))))
    const set = (key: string, value: string): void => { const el = this.#fields[key]; if (el && el.value !== value && document.activeElement !== el) el.value = value }
    set('since', f.since ?? ''); set('until', f.until ?? ''); set('k', String(q.k)); set('zone', f.zone === null ? '' : String(f.zone)); set('where', f.where)
    const range = (key: string, value: number): void => { const el = this.#fields[key]; if (el && Number(el.value) !== value) el.value = String(value) }
    range('clear', (f.clear ?? 0) * 100); range('offNadir', f.offNadir ?? 60)
    this.#fields['clear']?.style.setProperty('--at', `${(f.clear ?? 0) * 100}%`)
    this.#fields['offNadir']?.style.setProperty('--at', `${(((f.offNadir ?? 60) - 5) / 55) * 100}%`)
    for (const key of ['oneAPlace', 'otherPlace'] as const) { const el = this.#fields[key]; if (el) el.checked = f[key] }
    this.#area.textContent = drawing === 'box' ? 'Drag over the map. Esc ends.' : drawing === 'polygon' ? 'Click the corners; Enter or a double click ends.' : f.box ? 'A box is set.' : f.polygon ? 'An outline is set.' : ''
    this.#areaButtons.get('box')?.setAttribute('aria-pressed', String(drawing === 'box'))
    this.#areaButtons.get('polygon')?.setAttribute('aria-pressed', String(drawing === 'polygon'))
    const busy = answer.status === 'loading'
    this.#go.disabled = !isAsking(q)
    this.#go.classList.toggle('busy', busy)
    this.#go.setAttribute('aria-busy', String(busy))
    fill(this.#go, icon(this.#app.changed ? 'retry' : 'search'), this.#app.changed ? 'Ask again' : 'Search')
    this.#clear.hidden = !isAsking(q) && answer.status === 'idle'
  }
}

/** Say which collection is searched. */
export function collectionWords(app: App): string {
  const c = app.collection
  return c ? `${formatCount(c.chips)} chips${c.exact === false ? ', approximate index' : ''}` : ''
}
