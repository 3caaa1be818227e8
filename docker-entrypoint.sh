#!/bin/sh
# `lora-dpo` with the words that the container was started with. Others can reach a container's port, so the demo never
# runs there without a password: LORA_DPO_AUTH, or one that is made now and shown once.
set -eu
if [ "${1:-}" = demo ] && [ -z "${LORA_DPO_AUTH:-}" ]; then
    case " $* " in
    *" --auth"* | *" --help "*) ;;
    *)
        LORA_DPO_AUTH="me:$(python3 -c 'import secrets; print(secrets.token_urlsafe(12))')"
        export LORA_DPO_AUTH
        echo "user me, password ${LORA_DPO_AUTH#me:}   (or choose them: docker run -e LORA_DPO_AUTH=USER:PASSWORD)" >&2
        ;;
    esac
fi
exec lora-dpo "$@"
