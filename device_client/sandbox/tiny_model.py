"""A model of two operations, relu(x + 1), to start a runtime with before the door is locked.

XNNPACK reads /proc and /sys once, when the first model is loaded, and does without its own
kernels where it cannot. Made by TensorFlow's converter from a tf.Module of that one line.
"""

import base64
import zlib

__all__ = ["TINY_MODEL"]

TINY_MODEL = zlib.decompress(
    base64.b85decode(
        "c-n1JJx{_=6uqq#2oS_b2m=FygHr|6g~cFZB;mtgW87+!me>Re!D=93@Fy52et-"
        "k3lZ&H+qj5CO{tWBAueS|RUwZQHJMVs;zB~YEN6noK6d(^d$UqvB$i+ZG8;}E-"
        "Al?vj31ESUtpMN$Xrec*xQL>dIG&QsZ?R90cLnj_d7jKRanq%{uW!!_c&bT$yL|VFajR@^AZnfVS-pGO=(P1#U8^2e"
        "wJO&4dx)`L;5)D#eSGb>_Q29_tnrmSbRdHK3*s5EpxF>E$2gwf$3-"
        "|F>5&R^6SpbYh~Od|2V(X>Lq+IN(Ow^CPtJkF^C%(;psbclY7yXrYf;XUx<^#FD6{fU9iO}1pP*hd#2TJj%|^FS8#*"
        "|jYniIhFeCg@VMmlB#XSAjOGF<r;+zA+c7XK{VzZ*RBqTUC=eL%~aSp$?sOXJCgE?iML1M_f)1tR?hdAcC_ox9~r&$"
        "NOFCfm5U&sB#7`wKMf6X#$M!#PvF6E>6_h0cc_dn-1W0>alG*mS!^Z-"
        "`GUr{mVa*jZQ;NA7~$)CECco$?V;`{@_p<*x"
    )
)
