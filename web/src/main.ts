// Puts the page together: state from the link, panels, map, keys.
import './style.css'
import { api, ApiError, messageOf } from './api'
import { App, dataOf, type Notice } from './app'
import { boxArea } from './box'
import { calm, fill, h, icon, iconButton, isTyping } from './dom'
import { Drawer } from './draw'
import { distinctCredits, plural } from './format'
import { MapView } from './map'
import { makeHelp, makeTokenDialog } from './panels/help'
import { PlacePanel } from './panels/place'
import { ResultsPanel } from './panels/results'
import { SearchPanel } from './panels/search'
import { Timeline } from './panels/timeline'
import { VerdictsPanel } from './panels/verdicts'
import { isAsking } from './query'
import { readHash, Store, writeHash } from './state'
import type { Config, Judgement, LonLatBox, Polygon } from './types'

const root = document.getElementById('app') as HTMLElement
const token = makeTokenDialog()
document.body.append(token.el)

async function boot(): Promise<void> {
  fill(root, h('div.boot', { role: 'status' }, h('div.spinner', { 'aria-hidden': 'true' }), 'Opening the map…'))
  try { start(await api.config()) } catch (e) {
    if (e instanceof ApiError && e.status === 401) token.ask(() => void boot())
    fill(root, h('div.boot', { role: 'alert', 'data-testid': 'boot-problem' }, h('h1', {}, 'The map could not be opened'), h('p', {}, messageOf(e)), h('button.button.primary', { type: 'button', 'data-testid': 'retry', onclick: () => void boot() }, 'Try again')))
  }
}

/** Show short messages, one at a time. */
function makeToasts(): { el: HTMLElement; live: HTMLElement; show: (n: Notice) => void; announce: (text: string) => void } {
  const el = h('div.toasts')
  const live = h('div.visually-hidden', { role: 'status', 'aria-live': 'polite', 'data-testid': 'status' })
  let timer = 0
  const show = (n: Notice): void => {
    clearTimeout(timer)
    const close = (): void => { clearTimeout(timer); fill(el) }
    fill(el, h('div.toast', { class: n.bad ? 'toast bad' : 'toast', role: n.bad ? 'alert' : 'status', 'data-testid': 'toast' }, h('span', {}, n.text),
      n.action && h('button.textual', { type: 'button', onclick: () => { close(); n.action?.run() } }, n.action.label), iconButton('close', 'Dismiss', close)))
    if (!n.action) timer = window.setTimeout(() => fill(el), n.bad ? 9000 : 4500)
  }
  return { el, live, show, announce: (text) => { live.textContent = text } }
}

type SheetHeight = 'peek' | 'half' | 'full'
const HEIGHTS: SheetHeight[] = ['peek', 'half', 'full']
function setSheet(height: SheetHeight): void { document.body.dataset['sheet'] = height }

/** The grip of the sheet on a narrow screen: a click or a drag changes its height. */
function handle(): HTMLElement {
  let from: { y: number; at: number } | null = null
  let moved = false
  const at = (): number => HEIGHTS.indexOf((document.body.dataset['sheet'] ?? 'half') as SheetHeight)
  const el = h('button.handle', { type: 'button', 'aria-label': 'Height of the panel', 'data-testid': 'handle',
    onclick: () => { if (!moved) setSheet(HEIGHTS[at() === 2 ? 0 : at() + 1] ?? 'half') },
    onpointerdown: (e: PointerEvent) => { from = { y: e.clientY, at: at() }; moved = false; el.setPointerCapture(e.pointerId) },
    onpointermove: (e: PointerEvent) => {
      if (!from) return
      const steps = Math.round((from.y - e.clientY) / 120)
      if (Math.abs(from.y - e.clientY) > 8) moved = true
      setSheet(HEIGHTS[Math.min(2, Math.max(0, from.at + steps))] ?? 'half')
    },
    onpointerup: () => { from = null } }, h('span'))
  return el
}

function start(config: Config): void {
  const store = new Store(readHash(location.hash))
  const app = new App(store, config)
  const toasts = makeToasts()
  app.notify = toasts.show
  app.announce = toasts.announce
  app.needToken = token.ask
  document.title = config.title ? `${config.title} · imagesim` : 'imagesim'
  setSheet('half')
  const help = makeHelp(app)

  // -- what is on the page
  const mapBox = h('div.map', { 'data-testid': 'map' })
  const search = new SearchPanel(app, { draw: (kind) => draw(kind), useView: () => useView(), help: help.open })
  const open = (chip: string): void => { setSheet('half'); void app.openChip(chip) }
  const results = new ResultsPanel(app, { open, addClass: (name) => { search.addClass(name); search.input.focus() }, choosePicture: () => search.choosePicture() })
  const verdicts = new VerdictsPanel(app)
  const place = new PlacePanel(app, handle)
  const timeline = new Timeline(app, () => view?.setMosaic(app.state.mosaic))
  const judged = config.verdicts && app.collection !== null
  const tab = (name: 'search' | 'verdicts', label: string): HTMLButtonElement => h('button.tab', { type: 'button', role: 'tab', id: `tab-${name}`, 'aria-controls': `panel-${name}`, 'data-testid': `tab-${name}`, onclick: () => store.set({ view: name }), onkeydown: (e: KeyboardEvent) => {
    if (e.key !== 'ArrowLeft' && e.key !== 'ArrowRight') return
    const other = name === 'search' ? 'verdicts' : 'search'
    store.set({ view: other })
    document.getElementById(`tab-${other}`)?.focus()
  } }, label)
  const tabs = { search: tab('search', 'Search'), verdicts: tab('verdicts', 'Verdicts') }
  const panels = {
    search: h('div.scroll', { role: 'tabpanel', id: 'panel-search', 'aria-labelledby': 'tab-search' }, search.el, results.el),
    verdicts: h('div.scroll', { role: 'tabpanel', id: 'panel-verdicts', 'aria-labelledby': 'tab-verdicts' }, verdicts.el),
  }
  const dock = h('aside.dock.panel', { 'aria-label': 'Search', 'data-testid': 'dock' }, handle(), judged ? h('div.tabs', { role: 'tablist' }, tabs.search, tabs.verdicts) : null, panels.search, panels.verdicts)
  const bar = h('header.topbar', {}, icon('layers'), h('h1', {}, config.title || 'imagesim'), h('span.loading', { 'aria-hidden': 'true' }),
    iconButton('link', 'Copy a link to all this (C)', () => void copyLink(), { 'data-testid': 'copy-link' }), iconButton('help', 'Help and keys (?)', help.open, { 'data-testid': 'open-help' }))
  const zoom = h('div.zoom', { role: 'group', 'aria-label': 'Zoom' }, iconButton('plus', 'Zoom in', () => view?.zoomBy(1), { 'data-testid': 'zoom-in' }), iconButton('minus', 'Zoom out', () => view?.zoomBy(-1), { 'data-testid': 'zoom-out' }), iconButton('fit', 'Show all imagery (0)', () => fitAll(), { 'data-testid': 'fit' }))
  const credits = distinctCredits(config.credits)
  if (config.labels && !credits.some((c) => /openstreetmap/i.test(c))) credits.push('© OpenStreetMap contributors (ODbL)')
  const credit = h('footer.credits', { 'data-testid': 'credits', title: credits.join(' · ') }, credits.join(' · '))
  const drop = h('div.drop', { hidden: true, 'aria-hidden': 'true' }, h('div', {}, icon('picture'), 'Drop a picture to look for places like it'))
  fill(root, h('a.skip', { href: '#', onclick: (e: Event) => { e.preventDefault(); search.input.focus() } }, 'To the search'), bar, dock, mapBox, timeline.el, zoom, place.el, credit, toasts.el, toasts.live, drop, help.el)

  // -- the map
  let laid = 0 // the slider passes many dates; the map shows where it stays
  let view: MapView | null = null
  let drawer: Drawer | null = null
  const padding = (): { top: number; right: number; bottom: number; left: number } => {
    const narrow = matchMedia('(max-width: 760px)').matches
    const side = (el: HTMLElement): number => (el.hidden || getComputedStyle(el).visibility === 'hidden' ? 0 : el.getBoundingClientRect().width + 24)
    if (narrow) return { top: 130, right: 12, left: 12, bottom: Math.min(innerHeight * 0.5, innerHeight - dock.getBoundingClientRect().top + 24) }
    const wide = matchMedia('(min-width: 1101px)').matches
    return { top: 32, bottom: 120, left: dock.getBoundingClientRect().width + 24, right: 32 + (wide ? side(place.el) : 0) }
  }
  try {
    view = new MapView(mapBox, config, store.state, {
      pick: (lon, lat) => { setSheet('half'); void app.openAt(lon, lat) },
      pickResult: open,
      hover: (chip) => { if (chip !== app.live.hover) app.know({ hover: chip }) },
      moved: (center, z) => store.set({ center, zoom: z }),
      faults: (count) => app.know({ faults: count }),
      busy: (on) => { document.body.classList.toggle('map-busy', on || laid !== 0) },
    })
    drawer = new Drawer(view, (drawn) => {
      app.know({ drawing: null })
      if (drawn) store.filter('box' in drawn ? { box: drawn.box, polygon: null } : { polygon: drawn.polygon, box: null })
      if (drawn) app.announce('box' in drawn ? 'A box is set' : 'An outline is set')
      setSheet('half')
    })
  } catch (e) {
    fill(mapBox, h('div.no-map', { role: 'alert' }, h('p', {}, 'This browser cannot draw the map (WebGL 2 is missing or off). Search and labels still work.'), h('p.hint', {}, messageOf(e))))
  }
  const fitAll = (): void => view?.home(padding())
  const draw = (kind: 'box' | 'polygon'): void => {
    if (!drawer) return
    if (drawer.kind === kind) { drawer.cancel(); return }
    setSheet('peek')
    drawer.start(kind)
    app.know({ drawing: kind })
    toasts.show({ text: kind === 'box' ? 'Drag a box over the map. Esc ends.' : 'Click the corners. Enter or a double click ends, Esc gives up.' })
  }
  const useView = (): void => { if (view) { store.filter({ box: view.box(), polygon: null }); app.announce('A box is set') } }

  // -- from what is known to what the map shows
  const outlinesOf = (list: { kind: string; chip?: string }[]): Polygon[] => list.flatMap((e) => (e.chip ? [app.outlines.get(e.chip)].filter((o): o is Polygon => o !== undefined) : []))
  const showExamples = (): void => view?.setExamples(outlinesOf(app.question.likes), outlinesOf(app.question.unlikes))
  const showHeat = (): void => view?.setHeat(app.heatUrl(), dataOf(app.live.place)?.outline ?? null)
  const showFilter = (): void => { const f = app.question.filters; view?.setFilterArea(f.polygon ?? (f.box ? boxArea(f.box) : null)) }
  const showView = (): void => {
    const now = store.state.view
    const left = now === 'verdicts' && judged ? 'verdicts' : 'search'
    const inside = [dock, place.el].find((el) => el.contains(document.activeElement))
    document.body.dataset['view'] = now
    for (const name of ['search', 'verdicts'] as const) {
      panels[name].hidden = name !== left
      tabs[name].setAttribute('aria-selected', String(name === left))
      tabs[name].tabIndex = name === left ? 0 : -1
    }
    // where one panel covers the other the focus goes along
    const seen = (el: HTMLElement): boolean => el.checkVisibility({ visibilityProperty: true })
    if (inside === dock && !seen(dock)) place.el.focus({ preventScroll: true })
    else if (inside === place.el && !seen(place.el)) results.step(0)
  }
  app.listen((now, before) => {
    if (now.answer !== before.answer) { view?.setResults(dataOf(now.answer)?.features ?? []); showExamples() }
    if (now.place !== before.place) { view?.setSelected(dataOf(now.place)?.outline ?? null); showHeat(); showExamples(); document.body.classList.toggle('has-place', now.place.status !== 'idle') }
    if (now.hover !== before.hover) view?.setHover(now.hover)
    if (now.features !== before.features) view?.setFeatures(now.features)
  })
  app.reveal = (p) => view?.reveal([p.lon, p.lat], padding())
  app.showResults = (answer) => {
    if (!view || !answer.features.length) return
    const [w, s, e, n] = view.box()
    const spans = w <= e
    if (answer.features.some(({ properties: p }) => p.lat >= s && p.lat <= n && (spans ? p.lon >= w && p.lon <= e : p.lon >= w || p.lon <= e))) return
    const lons = answer.features.map((f) => f.properties.lon)
    const lats = answer.features.map((f) => f.properties.lat)
    const box: LonLatBox = [Math.min(...lons), Math.min(...lats), Math.max(...lons), Math.max(...lats)]
    if (box[2] - box[0] < 180) view.fit(box, padding())
  }

  // -- the link
  let timer = 0
  const write = (): void => { clearTimeout(timer); history.replaceState(null, '', `#${writeHash(store.state)}`) }
  app.push = () => {
    const next = `#${writeHash(store.state)}`
    if (next !== location.hash) history.pushState(null, '', next)
  }
  store.listen((now, before) => {
    clearTimeout(timer)
    timer = window.setTimeout(write, 250)
    if (now.mosaic !== before.mosaic) {
      clearTimeout(laid)
      document.body.classList.add('map-busy')
      laid = window.setTimeout(() => { laid = 0; view?.setMosaic(store.state.mosaic) }, 80)
    }
    if (now.question !== before.question) { showExamples(); if (now.question.filters !== before.question.filters) showFilter() }
    if (now.heat !== before.heat || now.chip !== before.chip) showHeat()
    if (now.view !== before.view) showView()
  })
  const restore = (): void => {
    const s = store.state
    showView(); showFilter(); showExamples()
    if (s.chip) void app.openChip(s.chip, s.center === null).then(() => store.set({ view: s.view }))
    if (s.asked && isAsking(s.question)) void app.ask()
  }
  window.addEventListener('popstate', () => {
    const s = readHash(location.hash)
    const keep = { likes: s.question.likes, unlikes: s.question.unlikes }
    clearTimeout(timer)
    const same = JSON.stringify({ ...s.question, ...keep }) === JSON.stringify(store.state.question)
    const { chip } = store.state
    store.set({ ...s, center: store.state.center, zoom: store.state.zoom })
    if (s.center && s.zoom !== null) view?.map.jumpTo({ center: s.center, zoom: s.zoom })
    if (!s.chip) app.know({ place: { status: 'idle' }, features: null })
    else if (s.chip !== chip) void app.openChip(s.chip, false).then(() => store.set({ view: s.view }))
    if (!same) { if (s.asked && isAsking(s.question)) void app.ask(); else app.know({ answer: { status: 'idle' }, answered: '' }) }
    showView()
  })
  async function copyLink(): Promise<void> {
    write()
    const lost = [...app.question.likes, ...app.question.unlikes].some((e) => e.kind === 'picture')
    try {
      await navigator.clipboard.writeText(location.href)
      toasts.show({ text: lost ? 'Link copied. Pictures are not part of it.' : 'Link copied. It restores all you see.' })
    } catch { toasts.show({ text: 'The browser does not allow copying; the link is in the address bar.' }) }
  }

  // -- pictures from outside
  const pictureIn = (items: DataTransfer | null): File | null => [...(items?.files ?? [])].find((f) => f.type.startsWith('image/')) ?? items?.files[0] ?? null
  let depth = 0
  const hasFiles = (e: DragEvent): boolean => e.dataTransfer?.types.includes('Files') ?? false
  window.addEventListener('dragenter', (e) => { if (hasFiles(e)) { depth++; drop.hidden = false } })
  window.addEventListener('dragleave', (e) => { if (hasFiles(e) && --depth <= 0) { depth = 0; drop.hidden = true } })
  window.addEventListener('dragover', (e) => { if (hasFiles(e)) e.preventDefault() })
  window.addEventListener('drop', (e) => {
    if (!hasFiles(e)) return
    e.preventDefault()
    depth = 0
    drop.hidden = true
    const file = pictureIn(e.dataTransfer)
    if (file) void app.addPicture(file, file.name)
  })
  window.addEventListener('paste', (e) => {
    const file = pictureIn(e.clipboardData)
    if (file) { e.preventDefault(); void app.addPicture(file, file.name || 'pasted picture') }
  })

  // -- keys
  const nextHeat = (): void => {
    const probs = dataOf(app.live.place)?.probs?.toSorted((a, b) => b.p - a.p).map((o) => o.class) ?? []
    if (!app.collection?.heat || !probs.length) return
    const i = store.state.heat ? probs.indexOf(store.state.heat) : -1
    app.setHeat(i >= 0 && i >= Math.min(probs.length, 5) - 1 ? null : (probs[i + 1] ?? null))
    app.announce(store.state.heat ? `Where the encoder sees ${app.titleOf(store.state.heat)}` : 'No overlay')
  }
  const target = (): string | null => results.focused() ?? dataOf(app.live.place)?.chip ?? null
  const judge = (v: Judgement): void => {
    const chip = target()
    const subject = results.focused() ? app.subject() : place.subject()
    if (chip && subject && judged) void app.judge(chip, v, subject)
  }
  const withTarget = (act: (chip: string) => void) => (): void => { const chip = target(); if (chip && app.collection) act(chip); else toasts.show({ text: 'Open a place first: click it, or press Enter on the map.' }) }
  const escape = (): void => {
    if (drawer?.kind) drawer.cancel()
    else if (!place.el.hidden && place.el.contains(document.activeElement)) { app.closePlace(); view?.map.getCanvas().focus() }
    else if (document.activeElement instanceof HTMLElement && document.activeElement !== document.body && !mapBox.contains(document.activeElement)) view?.map.getCanvas().focus({ preventScroll: true })
    else app.closePlace()
  }
  const keys: Record<string, () => void> = {
    '/': () => { store.set({ view: 'search' }); search.input.focus(); search.input.select() }, '?': help.open, '[': () => timeline.step(-1), ']': () => timeline.step(1), j: () => { store.set({ view: 'search' }); results.step(1) }, k: () => results.step(-1),
    s: withTarget((chip) => app.findSimilar(chip)), l: withTarget((chip) => app.toggleExample(chip, 'likes')), u: withTarget((chip) => app.toggleExample(chip, 'unlikes')), a: () => void app.ask(),
    y: () => judge('yes'), n: () => judge('no'), m: () => judge('unsure'), h: nextHeat, b: () => draw('box'), p: () => draw('polygon'), v: () => { if (judged) store.set({ view: store.state.view === 'verdicts' ? 'search' : 'verdicts' }) }, c: () => void copyLink(), '0': fitAll, Escape: escape,
  }
  document.addEventListener('keydown', (e) => {
    if (e.ctrlKey || e.metaKey || e.altKey || document.querySelector('dialog[open]')) return
    if (isTyping(e.target)) { if (e.key === 'Escape') escape(); return }
    const act = keys[e.key.length === 1 ? e.key.toLowerCase() : e.key]
    if (!act) return
    e.preventDefault()
    act()
  })

  if (store.state.center === null) view?.home(padding(), true)
  view?.setMosaic(store.state.mosaic)
  if (view) { const c = view.map.getCenter(); store.set({ center: [c.lng, c.lat], zoom: view.map.getZoom() }) }
  restore()
  void app.loadVerdicts()
  void app.loadSuggestions()
  if (!config.acquisitions.length) toasts.show({ text: 'The server knows no imagery: start it with --ard-path on a delivery.', bad: true })
  else app.announce(`${plural(config.acquisitions.length, 'acquisition')}`)
  document.body.classList.toggle('calm', calm())
  document.body.dataset['ready'] = 'true'
}

void boot()
