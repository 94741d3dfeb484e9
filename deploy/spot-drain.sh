#!/usr/bin/env bash
# Turns the notice that a spot machine is taken back into a drain of its Ray node: trainings write a checkpoint and go on
# elsewhere, and no new work is placed here. Run it beside `ray start`, with the same environment.
#
#   spot-drain.sh aws|gcp
set -euo pipefail

cloud=${1:?"say which cloud: aws or gcp"}
metadata=${SPOT_METADATA:-http://169.254.169.254}
every_s=${SPOT_EVERY_S:-5}
ask=(curl --silent --fail --max-time 2)

is_taken_back() {
    case $cloud in
    aws)
        local token
        token=$("${ask[@]}" -X PUT -H "X-aws-ec2-metadata-token-ttl-seconds: 60" "$metadata/latest/api/token") || return 1
        "${ask[@]}" -H "X-aws-ec2-metadata-token: $token" "$metadata/latest/meta-data/spot/instance-action" >/dev/null
        ;;
    gcp)
        [[ $("${ask[@]}" -H "Metadata-Flavor: Google" "$metadata/computeMetadata/v1/instance/preempted") == TRUE ]]
        ;;
    *)
        echo "spot-drain.sh: $cloud: no such cloud; aws or gcp" >&2
        exit 2
        ;;
    esac
}

case $cloud in
aws) notice_s=${SPOT_NOTICE_S:-110} ;; # AWS gives two minutes, GCP thirty seconds
*) notice_s=${SPOT_NOTICE_S:-25} ;;
esac

until is_taken_back; do
    sleep "$every_s"
done
echo "spot-drain.sh: $cloud takes this machine back; draining"
end=$((SECONDS + notice_s))
while left_s=$((end - SECONDS)) && ((left_s > 0)); do # a head that is busy, or starts again, is asked again
    if timeout 15 ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message "$cloud takes the machine back" \
        --deadline-remaining-seconds "$left_s"; then
        exit 0
    fi
    echo "spot-drain.sh: the head has not accepted the drain" >&2
    sleep "$every_s"
done
exit 1
