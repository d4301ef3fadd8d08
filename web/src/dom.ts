// Elements, made by hand. Text is only ever set as text.
type Child = Node | string | number | null | undefined | false
type Props = Record<string, unknown>

function setProp(el: Element, key: string, value: unknown): void {
  if (value === undefined || value === null || value === false) return
  if (key.startsWith('on') && typeof value === 'function') el.addEventListener(key.slice(2), value as EventListener)
  else if (key === 'value' && el instanceof HTMLInputElement) el.value = String(value)
  else if (key === 'checked' && el instanceof HTMLInputElement) el.checked = Boolean(value)
  else el.setAttribute(key, value === true ? '' : String(value))
}

/** Make an element: `h('button.primary', { type: 'button', onclick }, 'Search')`. */
export function h<K extends keyof HTMLElementTagNameMap>(what: K | `${K}.${string}`, props: Props = {}, ...children: Child[]): HTMLElementTagNameMap[K] {
  const [tag, ...classes] = what.split('.')
  const el = document.createElement(tag as K)
  if (classes.length) el.className = classes.join(' ')
  for (const [key, value] of Object.entries(props)) setProp(el, key, value)
  el.append(...children.filter((c): c is Node | string | number => c !== null && c !== undefined && c !== false).map((c) => (typeof c === 'number' ? String(c) : c)))
  return el
}

/** Replace what is inside an element, and leave the focus where it was if it is still there. */
export function fill(el: Element, ...children: Child[]): void {
  const focused = el.contains(document.activeElement) ? document.activeElement?.getAttribute('data-focus') : null
  el.replaceChildren(...children.filter((c): c is Node | string | number => c !== null && c !== undefined && c !== false).map((c) => (typeof c === 'number' ? String(c) : c)))
  if (focused) el.querySelector<HTMLElement>(`[data-focus="${CSS.escape(focused)}"]`)?.focus({ preventScroll: true })
}

const PATHS = {
  search: 'M10.5 10.5 14 14M11.5 7a4.5 4.5 0 1 1-9 0 4.5 4.5 0 0 1 9 0Z',
  close: 'M4 4l8 8M12 4l-8 8',
  plus: 'M8 3v10M3 8h10',
  minus: 'M3 8h10',
  link: 'M6.6 9.4 9.4 6.6M7 4.6l1.3-1.3a3 3 0 0 1 4.3 4.3L11.3 9M9 11.4l-1.3 1.3a3 3 0 0 1-4.3-4.3L4.7 7',
  help: 'M6 6.2a2 2 0 1 1 2.9 1.8c-.6.3-.9.7-.9 1.3M8 11.6v.1M14 8A6 6 0 1 1 2 8a6 6 0 0 1 12 0Z',
  picture: 'M2.5 3.5h11v9h-11zM2.5 10.5l3-3 3 3 2-2 3 3M10.5 6.2v.1',
  filter: 'M2 4.5h12M4.5 8h7M7 11.5h2',
  box: 'M3 3h2M7 3h2M11 3h2v2M13 7v2M13 11v2h-2M9 13H7M5 13H3v-2M3 9V7M3 5V3',
  polygon: 'M8 2.5 13.5 6.5 11.5 13h-7L2.5 6.5Z',
  view: 'M2 5.5V2.5h3M11 2.5h3v3M14 10.5v3h-3M5 13.5H2v-3',
  trash: 'M3 4.5h10M6.5 4.5v-2h3v2M4.5 4.5l.6 9h5.8l.6-9',
  save: 'M8 2.5v7M5 7l3 3 3-3M3 13h10',
  check: 'M3 8.5 6.5 12 13 4.5',
  question: 'M6 6a2 2 0 1 1 3 1.7c-.7.4-1 .8-1 1.6M8 12v.1',
  fit: 'M8 2v3M8 11v3M2 8h3M11 8h3M8 8v.1',
  eye: 'M1.5 8S4 3.8 8 3.8 14.5 8 14.5 8 12 12.2 8 12.2 1.5 8 1.5 8ZM9.8 8a1.8 1.8 0 1 1-3.6 0 1.8 1.8 0 0 1 3.6 0Z',
  back: 'M9.5 3.5 5 8l4.5 4.5',
  next: 'M6.5 3.5 11 8l-4.5 4.5',
  retry: 'M13 8a5 5 0 1 1-1.5-3.5M13 2.5v3h-3',
  layers: 'M8 2.5 14 6 8 9.5 2 6ZM2.5 9 8 12.5 13.5 9',
} as const
export type IconName = keyof typeof PATHS

export function icon(name: IconName): SVGSVGElement {
  const svg = document.createElementNS('http://www.w3.org/2000/svg', 'svg')
  const path = document.createElementNS('http://www.w3.org/2000/svg', 'path')
  for (const [k, v] of Object.entries({ viewBox: '0 0 16 16', width: '16', height: '16', 'aria-hidden': 'true', class: 'icon' })) svg.setAttribute(k, v)
  path.setAttribute('d', PATHS[name])
  svg.append(path)
  return svg
}

/** A button with a sign on it; the label is read out and shown as a hint. */
export function iconButton(name: IconName, label: string, onclick: () => void, more: Props = {}): HTMLButtonElement {
  return h('button.icon-button', { type: 'button', 'aria-label': label, title: label, onclick, ...more }, icon(name))
}

/** A picture that says so when it cannot be had. */
export function picture(src: string, alt: string, more: Props = {}): HTMLImageElement {
  const img = h('img', { src, alt, decoding: 'async', draggable: 'false', ...more })
  img.addEventListener('error', () => img.classList.add('broken'))
  return img
}

export function download(name: string, text: string, type: string): void {
  const at = URL.createObjectURL(new Blob([text], { type }))
  const a = h('a', { href: at, download: name })
  document.body.append(a)
  a.click()
  a.remove()
  setTimeout(() => URL.revokeObjectURL(at), 10_000)
}

export const isTyping = (target: EventTarget | null): boolean =>
  target instanceof HTMLElement && (target.isContentEditable || target instanceof HTMLTextAreaElement || target instanceof HTMLSelectElement || (target instanceof HTMLInputElement && !['checkbox', 'radio', 'range', 'button'].includes(target.type)))

export const calm = (): boolean => matchMedia('(prefers-reduced-motion: reduce)').matches
