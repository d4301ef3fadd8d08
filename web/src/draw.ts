// Drawing a box or an area on the map, with a mouse, a pen or a finger.
import { boxOf } from './box'
import type { MapView } from './map'
import { asPolygon } from './state'
import type { LonLatBox, Polygon, Position } from './types'

export type Drawn = { box: LonLatBox } | { polygon: Polygon }
type Point = { x: number; y: number }
const NEAR = 12 // pixels

export class Drawer {
  readonly #view: MapView
  readonly #done: (drawn: Drawn | null) => void
  #kind: 'box' | 'polygon' | null = null
  #corners: Position[] = []
  #from: Position | null = null
  #down: Point | null = null
  #stop = new AbortController()

  constructor(view: MapView, done: (drawn: Drawn | null) => void) {
    this.#view = view
    this.#done = done
  }
  get kind(): 'box' | 'polygon' | null { return this.#kind }

  start(kind: 'box' | 'polygon'): void {
    this.#end()
    this.#kind = kind
    this.#view.drawing = true
    const { map } = this.#view
    map.dragPan.disable()
    map.doubleClickZoom.disable()
    map.boxZoom.disable()
    map.getContainer().classList.add('drawing')
    this.#stop = new AbortController()
    const { signal } = this.#stop
    const canvas = map.getCanvasContainer()
    canvas.addEventListener('pointerdown', (e) => this.#press(e), { signal })
    canvas.addEventListener('pointermove', (e) => this.#move(e), { signal })
    canvas.addEventListener('pointerup', (e) => this.#release(e), { signal })
    canvas.addEventListener('dblclick', () => this.finish(), { signal })
    document.addEventListener('keydown', (e) => this.#key(e), { signal, capture: true })
  }

  #at(e: Point): Position { const p = this.#view.map.unproject([e.x, e.y]); return [p.lng, p.lat] }
  #point(e: PointerEvent): Point { const r = this.#view.map.getContainer().getBoundingClientRect(); return { x: e.clientX - r.left, y: e.clientY - r.top } }
  #close(a: Position, b: Point): boolean { const p = this.#view.map.project(a); return Math.hypot(p.x - b.x, p.y - b.y) < NEAR }

  #press(e: PointerEvent): void {
    if (e.button !== 0) return
    this.#down = this.#point(e)
    if (this.#kind === 'box') this.#from = this.#at(this.#down)
  }
  #move(e: PointerEvent): void {
    const here = this.#at(this.#point(e))
    if (this.#kind === 'box' && this.#from) this.#show([this.#from, [here[0], this.#from[1]], here, [this.#from[0], here[1]]], true)
    else if (this.#kind === 'polygon' && this.#corners.length) this.#show([...this.#corners, here], this.#corners.length > 1)
  }
  #release(e: PointerEvent): void {
    const here = this.#point(e)
    const down = this.#down
    this.#down = null
    if (!down) return
    if (this.#kind === 'box') {
      const box = this.#from && Math.hypot(here.x - down.x, here.y - down.y) > 4 ? boxOf(this.#from, this.#at(here)) : null
      this.#from = null
      if (box) this.#finish({ box })
      return
    }
    const first = this.#corners[0]
    const last = this.#corners.at(-1)
    if (first && this.#corners.length > 2 && this.#close(first, here)) { this.finish(); return }
    if (last && this.#close(last, here)) return
    this.#corners.push(this.#at(here))
    this.#show(this.#corners, this.#corners.length > 2)
  }
  #key(e: KeyboardEvent): void {
    if (e.key === 'Escape') this.cancel()
    else if (e.key === 'Enter' && this.#corners.length > 2) this.finish()
    else if (e.key === 'Backspace' && this.#corners.length) { this.#corners.pop(); this.#show(this.#corners, this.#corners.length > 2) }
    else return
    e.preventDefault()
    e.stopPropagation()
  }

  #show(corners: Position[], closed: boolean): void {
    const line: GeoJSON.Geometry = closed ? { type: 'Polygon', coordinates: [[...corners, corners[0] as Position]] } : { type: 'LineString', coordinates: corners.length > 1 ? corners : [...corners, ...corners] }
    this.#view.setDrawing([{ type: 'Feature', geometry: line, properties: {} }, ...this.#corners.map((c): GeoJSON.Feature => ({ type: 'Feature', geometry: { type: 'Point', coordinates: c }, properties: {} }))])
  }

  /** End an area with the corners that it has. */
  finish(): void {
    const polygon = this.#kind === 'polygon' ? asPolygon(this.#corners) : null
    if (polygon) this.#finish({ polygon })
  }
  cancel(): void { if (this.#kind) this.#finish(null) }

  #finish(drawn: Drawn | null): void {
    this.#end()
    this.#done(drawn)
  }
  #end(): void {
    this.#stop.abort()
    this.#corners = []
    this.#from = null
    this.#down = null
    this.#kind = null
    this.#view.setDrawing([])
    const { map } = this.#view
    map.dragPan.enable()
    map.boxZoom.enable()
    map.getContainer().classList.remove('drawing')
    // the second click of a double click must not zoom
    setTimeout(() => { if (!this.#kind) { map.doubleClickZoom.enable(); this.#view.drawing = false } }, 350)
  }
}
