// Small pieces that several panels show.
import type { Remote } from '../app'
import { h, icon } from '../dom'
import type { Judgement } from '../types'

export const JUDGEMENTS: { verdict: Judgement; label: string; key: string }[] = [
  { verdict: 'yes', label: 'Yes', key: 'Y' }, { verdict: 'no', label: 'No', key: 'N' }, { verdict: 'unsure', label: 'Unsure', key: 'M' },
]
export const judgementIcon = (v: Judgement): SVGSVGElement => icon(v === 'yes' ? 'check' : v === 'no' ? 'close' : 'question')

/** Say what failed, and offer to try again. */
export function problem(what: string, r: Extract<Remote<unknown>, { status: 'error' }>): HTMLElement {
  return h('div.problem', { role: 'alert', 'data-testid': 'problem' },
    h('strong', {}, what), h('p', {}, r.message),
    h('button.button', { type: 'button', onclick: r.retry, 'data-testid': 'retry' }, icon('retry'), 'Try again'))
}

export function swatch(colour: string): HTMLElement {
  const el = h('span.swatch', { 'aria-hidden': 'true' })
  el.style.background = colour
  return el
}
