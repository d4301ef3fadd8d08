// The map: the mosaic, and what is drawn over it.
import { LngLatBounds, Map as GlMap, ScaleControl, setWorkerUrl, type GeoJSONSource } from 'maplibre-gl'
import workerUrl from 'maplibre-gl/dist/maplibre-gl-worker.mjs?url'
import { calm, h } from './dom'
import { formatDay, formatScore } from './format'
import { pictureCorners, tileUrl } from './tiles'
import type { Config, LonLatBox, Mosaic, Polygon, Position, ResultFeature } from './types'

setWorkerUrl(new URL(workerUrl, document.baseURI).href)

export const ACCENT = '#5fe0c8'
const UNLIKE = '#ff8f85'

export interface MapEvents {
  pick(lon: number, lat: number): void
  pickResult(chip: string): void
  hover(chip: string | null): void
  moved(center: Position, zoom: number): void
  faults(count: number): void
  busy(loading: boolean): void
}

type Feature = GeoJSON.Feature
const collection = (features: Feature[]): GeoJSON.FeatureCollection => ({ type: 'FeatureCollection', features })
const area = (geometry: Polygon, properties: GeoJSON.GeoJsonProperties = {}): Feature => ({ type: 'Feature', geometry, properties })

export class MapView {
  readonly map: GlMap
  readonly #config: Config
  readonly #events: MapEvents
  readonly #tip: HTMLElement
  #layers = 0
  #shown: string | null = null // the mosaic that is complete
  #pending: string | null = null // the one that is being loaded
  #failed = new Set<string>()
  #hovered: string | null = null
  #results: ResultFeature[] = []
  #ready = false
  #later: (() => void)[] = []
  drawing = false

  constructor(container: HTMLElement, config: Config, start: { center: Position | null; zoom: number | null }, events: MapEvents) {
    this.#config = config
    this.#events = events
    const [lon, lat, zoom] = config.center ?? [0, 20, 1]
    this.map = new GlMap({
      container,
      style: { version: 8, sources: {}, layers: [{ id: 'ground', type: 'background', paint: { 'background-color': '#0a0d11' } }] },
      center: start.center ?? [lon, lat],
      zoom: start.zoom ?? zoom,
      minZoom: 1, maxZoom: 21.5, maxPitch: 0, dragRotate: false, pitchWithRotate: false, touchPitch: false, attributionControl: false, fadeDuration: calm() ? 0 : 200,
      renderWorldCopies: true, refreshExpiredTiles: false, cancelPendingTileRequestsWhileZooming: true,
    })
    this.map.touchZoomRotate.disableRotation()
    this.map.keyboard.disableRotation()
    this.map.addControl(new ScaleControl({ maxWidth: 90 }), 'bottom-right')
    this.map.getCanvas().setAttribute('aria-label', 'Map of the imagery. Arrow keys move, plus and minus zoom, Enter opens the place in the middle.')
    this.map.getCanvas().dataset['testid'] = 'map-canvas'
    this.#tip = h('div.map-tip', { hidden: true, 'aria-hidden': 'true' })
    container.append(this.#tip, h('div.crosshair', { 'aria-hidden': 'true' }))
    this.map.on('load', () => this.#start())
    this.map.on('error', (e) => this.#onError(e as unknown as { error?: Error; sourceId?: string; tile?: { tileID?: { key?: string } } }))
    this.map.on('moveend', () => { const c = this.map.getCenter(); events.moved([c.lng, c.lat], this.map.getZoom()) })
    this.map.on('dataloading', () => events.busy(true))
    this.map.on('idle', () => { events.busy(false); container.dataset['idle'] = String(Number(container.dataset['idle'] ?? 0) + 1) })
  }

  #when(act: () => void): void { if (this.#ready) act(); else this.#later.push(act) }

  #start(): void {
    const { map } = this
    const empty = collection([])
    for (const id of ['features', 'filter', 'results', 'examples', 'selected', 'draw']) map.addSource(id, { type: 'geojson', data: empty, ...(id === 'results' && { promoteId: 'chip' }) })
    const hot = (yes: number, no: number): ['case', ['boolean', ['feature-state', 'hover'], false], number, number] => ['case', ['boolean', ['feature-state', 'hover'], false], yes, no]
    map.addLayer({ id: 'features-fill', type: 'fill', source: 'features', filter: ['==', ['geometry-type'], 'Polygon'], paint: { 'fill-color': ['to-color', ['get', 'colour'], '#ffffff'], 'fill-opacity': 0.28 } })
    map.addLayer({ id: 'features-case', type: 'line', source: 'features', paint: { 'line-color': '#05070a', 'line-width': 4, 'line-opacity': 0.55 } })
    map.addLayer({ id: 'features-line', type: 'line', source: 'features', paint: { 'line-color': ['to-color', ['get', 'colour'], '#ffffff'], 'line-width': 2 } })
    map.addLayer({ id: 'filter-line', type: 'line', source: 'filter', paint: { 'line-color': '#ffffff', 'line-width': 1.5, 'line-dasharray': [3, 3], 'line-opacity': 0.85 } })
    map.addLayer({ id: 'results-fill', type: 'fill', source: 'results', paint: { 'fill-color': ACCENT, 'fill-opacity': hot(0.3, 0.05) } })
    map.addLayer({ id: 'results-case', type: 'line', source: 'results', paint: { 'line-color': '#05070a', 'line-width': hot(6, 4), 'line-opacity': 0.55 } })
    map.addLayer({ id: 'results-line', type: 'line', source: 'results', paint: { 'line-color': ACCENT, 'line-width': hot(3.5, 1.75) } })
    map.addLayer({ id: 'examples-line', type: 'line', source: 'examples', filter: ['==', ['get', 'side'], 'likes'], paint: { 'line-color': ACCENT, 'line-width': 3.5 } })
    map.addLayer({ id: 'examples-dash', type: 'line', source: 'examples', filter: ['==', ['get', 'side'], 'unlikes'], paint: { 'line-color': UNLIKE, 'line-width': 3.5, 'line-dasharray': [2, 1] } })
    map.addLayer({ id: 'selected-case', type: 'line', source: 'selected', paint: { 'line-color': '#05070a', 'line-width': 6, 'line-opacity': 0.6 } })
    map.addLayer({ id: 'selected-line', type: 'line', source: 'selected', paint: { 'line-color': '#ffffff', 'line-width': 2.5 } })
    map.addLayer({
      id: 'results-dot', type: 'circle', source: 'results', maxzoom: 13.5, filter: ['==', ['geometry-type'], 'Polygon'],
      paint: { 'circle-color': ACCENT, 'circle-radius': hot(8, 5), 'circle-stroke-color': '#05070a', 'circle-stroke-width': 1.5 },
    })
    map.addLayer({ id: 'draw-fill', type: 'fill', source: 'draw', filter: ['==', ['geometry-type'], 'Polygon'], paint: { 'fill-color': '#ffffff', 'fill-opacity': 0.12 } })
    map.addLayer({ id: 'draw-line', type: 'line', source: 'draw', paint: { 'line-color': '#ffffff', 'line-width': 2 } })
    map.addLayer({ id: 'draw-point', type: 'circle', source: 'draw', filter: ['==', ['geometry-type'], 'Point'], paint: { 'circle-color': '#ffffff', 'circle-radius': 4, 'circle-stroke-color': '#05070a', 'circle-stroke-width': 1.5 } })
    map.on('click', (e) => {
      if (this.drawing) return
      const hit = map.queryRenderedFeatures(e.point, { layers: ['results-fill', 'results-dot'] })[0]
      const chip: unknown = hit?.properties['chip']
      if (typeof chip === 'string') this.#events.pickResult(chip)
      else { const at = e.lngLat.wrap(); this.#events.pick(at.lng, at.lat) }
    })
    map.on('mousemove', (e) => {
      if (this.drawing) return
      const hit = map.queryRenderedFeatures(e.point, { layers: ['results-fill', 'results-dot'] })[0]
      const chip: unknown = hit?.properties['chip']
      map.getCanvas().style.cursor = hit ? 'pointer' : ''
      this.#events.hover(typeof chip === 'string' ? chip : null)
    })
    map.on('mouseout', () => this.#events.hover(null))
    map.on('move', () => this.#placeTip())
    map.getCanvas().addEventListener('keydown', (e) => {
      if (e.key !== 'Enter' || this.drawing) return
      const c = map.getCenter().wrap()
      this.#events.pick(c.lng, c.lat)
    })
    this.#ready = true
    for (const act of this.#later.splice(0)) act()
    this.map.getContainer().dataset['ready'] = 'true'
  }

  #onError(e: { error?: Error; sourceId?: string; tile?: { tileID?: { key?: string } } }): void {
    if (e.sourceId?.startsWith('mosaic') || e.tile) {
      this.#failed.add(e.tile?.tileID?.key ?? String(this.#failed.size))
      this.#events.faults(this.#failed.size)
    } else if (e.sourceId !== 'heat') console.warn('map:', e.error?.message ?? 'unknown problem')
  }

  /** Show another mosaic; the one before stays until the new one is there. */
  setMosaic(mosaic: Mosaic): void {
    this.#when(() => {
      const { map } = this
      const drop = (id: string | null): void => { if (id && map.getLayer(id)) { map.removeLayer(id); map.removeSource(id) } }
      const id = `mosaic-${++this.#layers}`
      drop(this.#pending)
      this.#pending = id
      this.#failed.clear()
      this.#events.faults(0)
      const t = this.#config.tiles
      const dense = devicePixelRatio > 1.5 // 512 pixels in the place of 256
      map.addSource(id, { type: 'raster', tiles: [tileUrl(t.url, mosaic, document.baseURI)], tileSize: dense ? 256 : 512, minzoom: t.min_zoom, maxzoom: Math.max(t.min_zoom, dense ? t.max_zoom : t.max_zoom - 1), ...(this.#config.bounds && this.#config.bounds[0] < this.#config.bounds[2] && { bounds: this.#config.bounds }) })
      map.addLayer({ id, type: 'raster', source: id, paint: { 'raster-fade-duration': calm() ? 0 : 200 } }, map.getLayer('heat') ? 'heat' : 'features-fill')
      this.map.getContainer().dataset['mosaic'] = mosaic.mode === 'best' ? 'best' : `${mosaic.mode}=${mosaic.date}`
      void map.once('idle').then(() => {
        if (this.#pending !== id) return
        drop(this.#shown)
        this.#shown = id
        this.#pending = null
      })
    })
  }

  #data(id: string, features: Feature[]): void { this.#when(() => { this.map.getSource<GeoJSONSource>(id)?.setData(collection(features)) }) }

  setResults(features: ResultFeature[]): void {
    this.#results = features
    this.setHover(null)
    this.#data('results', features.map((f) => ({ type: 'Feature', geometry: f.geometry, properties: { chip: f.properties.chip, rank: f.properties.rank } })))
  }
  setSelected(outline: Polygon | null): void { this.#data('selected', outline ? [area(outline)] : []) }
  setFilterArea(geometry: Polygon | null): void { this.#data('filter', geometry ? [area(geometry)] : []) }
  setDrawing(features: Feature[]): void { this.#data('draw', features) }
  setExamples(likes: Polygon[], unlikes: Polygon[]): void { this.#data('examples', [...likes.map((g) => area(g, { side: 'likes' })), ...unlikes.map((g) => area(g, { side: 'unlikes' }))]) }
  setFeatures(features: GeoJSON.FeatureCollection | null): void { this.#data('features', features?.features ?? []) }

  setHeat(address: string | null, outline: Polygon | null): void {
    this.#when(() => {
      const { map } = this
      if (map.getLayer('heat')) map.removeLayer('heat')
      if (map.getSource('heat')) map.removeSource('heat')
      if (!address || !outline) return
      map.addSource('heat', { type: 'image', url: new URL(address, document.baseURI).href, coordinates: pictureCorners(outline) })
      map.addLayer({ id: 'heat', type: 'raster', source: 'heat', paint: { 'raster-opacity': 0.75, 'raster-fade-duration': 0 } }, 'features-fill')
    })
  }

  setHover(chip: string | null): void {
    if (chip === this.#hovered) return
    const before = this.#hovered
    this.#hovered = chip
    this.#when(() => {
      if (before) this.map.setFeatureState({ source: 'results', id: before }, { hover: false })
      if (chip) this.map.setFeatureState({ source: 'results', id: chip }, { hover: true })
    })
    const f = chip ? this.#results.find((r) => r.properties.chip === chip) : undefined
    this.#tip.hidden = !f
    if (f) this.#tip.textContent = `${f.properties.rank} · ${formatScore(f.properties.score)} · ${formatDay(f.properties.date)}`
    this.#placeTip()
  }
  #placeTip(): void {
    const f = this.#hovered ? this.#results.find((r) => r.properties.chip === this.#hovered) : undefined
    if (!f) return
    const ring = f.geometry.coordinates[0] ?? []
    const top = ring.reduce((a, b) => (b[1] > a[1] ? b : a), ring[0] ?? [f.properties.lon, f.properties.lat])
    const at = this.map.project([f.properties.lon, top[1]])
    const { clientWidth: w, clientHeight: hgt } = this.map.getContainer()
    const shown = at.x >= 0 && at.y >= 0 && at.x <= w && at.y <= hgt
    this.#tip.hidden = !shown
    this.#tip.style.transform = `translate(calc(${Math.round(at.x)}px - 50%), calc(${Math.round(at.y)}px - 100% - 8px))`
  }

  box(): LonLatBox {
    const b = this.map.getBounds()
    const wrap = (x: number): number => ((x + 540) % 360) - 180
    return b.getEast() - b.getWest() >= 360 ? [-180, b.getSouth(), 180, b.getNorth()] : [wrap(b.getWest()), b.getSouth(), wrap(b.getEast()), b.getNorth()]
  }
  /** Show all imagery, as the server says where it lies. */
  home(padding: { top: number; right: number; bottom: number; left: number }, atOnce = false): void {
    if (!this.#config.center) return
    const [lon, lat, zoom] = this.#config.center
    const { clientWidth: w, clientHeight: hgt } = this.map.getContainer()
    const room = Math.min(w - padding.left - padding.right, hgt - padding.top - padding.bottom)
    this.map.easeTo({ center: [lon, lat], zoom: Math.max(1, zoom + Math.min(0, Math.log2(Math.max(120, room) / 640))), offset: [(padding.left - padding.right) / 2, (padding.top - padding.bottom) / 2], duration: atOnce || calm() ? 0 : 700 })
  }
  fit(box: LonLatBox, padding: { top: number; right: number; bottom: number; left: number }, maxZoom = 17): void {
    const [w, s, e, n] = box
    this.map.fitBounds(new LngLatBounds([w, s], [e < w ? e + 360 : e, n]), { padding, maxZoom, duration: calm() ? 0 : 700 })
  }
  /** Bring a position into the free part of the map, if it is not there. */
  reveal(at: Position, padding: { top: number; right: number; bottom: number; left: number }, zoom?: number): void {
    const p = this.map.project(at)
    const { clientWidth: w, clientHeight: hgt } = this.map.getContainer()
    const inside = p.x > padding.left + 30 && p.x < w - padding.right - 30 && p.y > padding.top + 30 && p.y < hgt - padding.bottom - 30
    if (inside && (zoom === undefined || this.map.getZoom() >= zoom)) return
    this.map.easeTo({ center: at, ...(zoom !== undefined && this.map.getZoom() < zoom && { zoom }), offset: [(padding.left - padding.right) / 2, (padding.top - padding.bottom) / 2], duration: calm() ? 0 : 500 })
  }
  zoomBy(steps: number): void { this.map.easeTo({ zoom: this.map.getZoom() + steps, duration: calm() ? 0 : 250 }) }
}
