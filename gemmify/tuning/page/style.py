"""The style sheet and the script of the report; both stand inside the page."""

CSS = """
:root{color-scheme:light dark;--ground:#fff;--text:#1b1f24;--dim:#5b6570;--line:#d5dae0;--box:#f4f6f8;--link:#0b57a4;
--before:#9aa5b1;--after:#0b6bcb;--good:#13713a;--bad:#b3261e;
--c0:#0b6bcb;--c1:#c2540a;--c2:#13804a;--c3:#a3278f;--c4:#8a6d00;--c5:#00788a;--c6:#b3261e;--c7:#5a5f66}
@media(prefers-color-scheme:dark){:root{--ground:#14171b;--text:#e6e9ed;--dim:#a0a9b4;--line:#3a424c;--box:#1e2329;
--link:#7db8f5;--before:#66707c;--after:#5aa9f2;--good:#5ecb8b;--bad:#ff8a80;
--c0:#5aa9f2;--c1:#f59a56;--c2:#5ecb8b;--c3:#e58ad6;--c4:#d9b93b;--c5:#45c8dc;--c6:#ff8a80;--c7:#b3bac2}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:70rem;background:var(--ground);color:var(--text);
font:15px/1.45 system-ui,sans-serif}
h1{font-size:1.5rem;margin:.2rem 0}h2{font-size:1.2rem;margin:1.6rem 0 .4rem}h3{font-size:1rem;margin:1rem 0 .3rem}
p{margin:.4rem 0}.dim,figcaption{color:var(--dim)}a{color:var(--link)}
code,pre{font:13px/1.4 ui-monospace,monospace}
pre{background:var(--box);padding:.6rem;overflow:auto;white-space:pre-wrap}
.tiles{display:flex;flex-wrap:wrap;gap:.6rem;margin:.6rem 0;padding:0;list-style:none}
.tiles li{background:var(--box);border-radius:.4rem;padding:.5rem .8rem}.tiles b{display:block;font-size:1.25rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:.25rem .5rem;border-bottom:1px solid var(--line);vertical-align:top}
td.n,th.n{text-align:right;white-space:nowrap}td.w{overflow-wrap:anywhere;min-width:8rem}
.good{color:var(--good)}.bad{color:var(--bad)}
figure{margin:.6rem 0}
figure .scroll>svg{min-width:34rem}
.chart{width:100%;height:auto;display:block}.chart text{font-size:12px;fill:var(--dim)}
.chart .note{fill:var(--text)}.bars{width:12rem;max-width:40vw;height:1.2rem;display:block}
.grid{stroke:var(--line);stroke-width:.6;fill:none}.axis{stroke:var(--dim);fill:none}
.limit,.boundline{stroke:var(--dim);stroke-dasharray:5 4;fill:none}.boundline{stroke:var(--text);stroke-dasharray:none}
.line{fill:none;stroke-width:2}.before{fill:var(--before)}.after{fill:var(--after)}
.p{fill:currentColor;stroke:none}.x{fill:none;stroke:currentColor;stroke-width:1.4}.best{stroke:var(--text)}
.p.on{stroke:var(--text);stroke-width:3}.line{stroke:currentColor}
.c0{color:var(--c0)}.c1{color:var(--c1)}.c2{color:var(--c2)}.c3{color:var(--c3)}.c4{color:var(--c4)}.c5{color:var(--c5)}
.c6{color:var(--c6)}.c7{color:var(--c7)}.key{white-space:nowrap;margin-right:.9rem}
.key::before{content:"";display:inline-block;width:.7em;height:.7em;border-radius:50%;background:currentColor;
margin-right:.3em}.key span{color:var(--text)}
details{border-bottom:1px solid var(--line)}summary{cursor:pointer;padding:.4rem 0}
:focus-visible{outline:2px solid var(--link);outline-offset:2px}
#hint{position:fixed;left:.5rem;right:.5rem;bottom:.5rem;margin:auto;max-width:40rem;background:var(--text);
color:var(--ground);padding:.4rem .7rem;border-radius:.4rem;overflow-wrap:anywhere}#hint:empty{display:none}
.skip{position:absolute;left:-99rem}.skip:focus{position:static}
@media print{details>*{display:block}#hint{display:none}}
"""

JS = """
(function(){
var hint=document.getElementById('hint'),now=null;
function show(p){if(now)now.classList.remove('on');now=p;if(!p){hint.textContent='';return}
p.classList.add('on');hint.textContent=p.querySelector('title').textContent}
function near(svg,e){var m=svg.getScreenCTM();if(!m)return null;
var x=(e.clientX-m.e)/m.a,y=(e.clientY-m.f)/m.d,best=null,least=400;
svg.querySelectorAll('.p').forEach(function(p){var b=p.getBBox(),dx=b.x+b.width/2-x,dy=b.y+b.height/2-y,d=dx*dx+dy*dy;
if(d<least){least=d;best=p}});return best}
document.querySelectorAll('svg.chart').forEach(function(svg){
svg.addEventListener('pointermove',function(e){if(e.pointerType==='mouse')show(near(svg,e))});
svg.addEventListener('pointerleave',function(e){if(e.pointerType==='mouse')show(null)});
svg.addEventListener('click',function(e){show(near(svg,e))});
svg.addEventListener('blur',function(){show(null)});
svg.addEventListener('keydown',function(e){var all=svg.querySelectorAll('.p'),i=Array.prototype.indexOf.call(all,now);
if(e.key==='ArrowRight')i=Math.min(all.length-1,i+1);else if(e.key==='ArrowLeft')i=i<0?all.length-1:Math.max(0,i-1);
else if(e.key==='Home')i=0;else if(e.key==='End')i=all.length-1;else if(e.key==='Escape'){show(null);return}else return;
if(all.length){show(all[i]);e.preventDefault()}})});
function open(){var d=document.getElementById(location.hash.slice(1));if(d&&d.tagName==='DETAILS')d.open=true}
addEventListener('hashchange',open);open();
})();
"""
